//! What a client has sent before its server has accepted the connection.
//!
//! Until accept(2) the other end has no descriptor, so that nobody can look into its queue from outside, and whoever
//! accepted it would change the program. An eBPF iterator reads it at dump; at restore the client sends it again.

use std::collections::HashMap;
use std::rc::Rc;

use super::super::ObjectError;
use super::super::file::{Capture, Seen};
use crate::image::proto::{SkPacketEntry, SkUcredEntry, UnixSentEntry};
use crate::kernel::ebpf::waiting::{self, Waiting};
use crate::kernel::surveyor::Source;
use crate::plan::FileRef;

use super::steps::{Fill, Sender};

/// What waits in all such connections, by the client's inode, or why it is not known; asked once in a dump.
pub type Known = Option<Rc<Result<HashMap<u64, Vec<Waiting>>, String>>>;

/// What a client has sent. What cannot be had is refused.
pub fn capture(seen: &Seen, cx: &mut Capture<'_>) -> Result<Vec<UnixSentEntry>, ObjectError> {
    let known = known(cx);
    let packets = match known.as_ref() {
        Ok(all) => all.get(&seen.stat.st_ino).map(Vec::as_slice).unwrap_or_default(),
        Err(why) => {
            refuse(seen, cx, why);
            return Ok(Vec::new());
        }
    };
    if let Some(why) = obstacle(packets) {
        refuse(seen, cx, why);
    }
    Ok(packets.iter().map(entry).collect())
}

fn known(cx: &mut Capture<'_>) -> Rc<Result<HashMap<u64, Vec<Waiting>>, String>> {
    let by_proc = cx.options.survey == Source::Proc;
    let ask = || {
        if by_proc {
            return Err("only eBPF can read it, and the survey is to be by /proc".to_owned());
        }
        waiting::all().map_err(|error| format!("eBPF, which could read it, is not to be had: {error}"))
    };
    Rc::clone(cx.shelf.get::<super::Known>().sent.get_or_insert_with(|| Rc::new(ask())))
}

fn refuse(seen: &Seen, cx: &mut Capture<'_>, why: &str) {
    cx.refuse(seen.refuse(
        format!("data waits in a connection that its server has not accepted yet: {why}"),
        "dump when the server has accepted it",
    ));
}

/// Why what waits cannot be carried over.
fn obstacle(packets: &[Waiting]) -> Option<&'static str> {
    let Some(first) = packets.first() else { return Some("it was not found") };
    if packets.len() != first.record.of as usize {
        return Some("it changes while it is read");
    }
    if packets.iter().any(|packet| packet.data.len() != packet.record.length as usize) {
        return Some("it is where eBPF cannot read it");
    }
    packets.iter().map(|packet| packet.record).find_map(|record| match record {
        _ if record.files != 0 => Some("descriptors come with it"),
        _ if record.urgent != 0 => Some("there is urgent data in it"),
        _ => None,
    })
}

fn entry(packet: &Waiting) -> UnixSentEntry {
    let record = packet.record;
    let ucred = (record.pid != 0).then_some(SkUcredEntry { pid: record.pid, uid: record.uid, gid: record.gid });
    UnixSentEntry { data: packet.data.clone(), ucred }
}

/// Has a client send it again, once it has connected.
pub fn again(client: FileRef, id: u32, stream: bool, sent: &[UnixSentEntry]) -> Fill {
    let packet = |sent: &UnixSentEntry| {
        let length = sent.data.len() as u32;
        let entry = SkPacketEntry { id_for: id, length, ucred: sent.ucred, ..SkPacketEntry::default() };
        (entry, sent.data.clone(), Vec::new(), Sender::Peer(client))
    };
    Fill { packets: sent.iter().map(packet).collect(), stream }
}

#[cfg(test)]
mod tests {
    use criu_common::waiting::Packet;

    use super::*;

    fn packet(change: impl FnOnce(&mut Packet)) -> Waiting {
        let mut record = Packet { client: 7, of: 1, length: 3, ..Packet::default() };
        change(&mut record);
        Waiting { record, data: b"one".to_vec() }
    }

    #[test]
    fn only_what_is_whole_can_be_sent_again() {
        assert_eq!(obstacle(&[packet(|_| {})]), None);
        assert!(obstacle(&[]).is_some());
        assert!(obstacle(&[packet(|p| p.of = 2)]).is_some());
        assert!(obstacle(&[packet(|p| p.files = 1)]).is_some());
        assert!(obstacle(&[packet(|p| p.urgent = 1)]).is_some());
        assert!(obstacle(&[packet(|p| p.length = 5000)]).is_some());
    }
}
