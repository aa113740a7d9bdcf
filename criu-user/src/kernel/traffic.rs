//! Programs at interfaces as filters of traffic control: rtnetlink(7), tc-bpf(8).
//!
//! Filters for packets that come in and go out hang on a queueing discipline `clsact`, of which an interface has at most
//! one. Whoever comes first makes it.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use netlink_bindings::tc::{OpGetqdiscDump, OpGettfilterDump, OptionsMsg, Request, Tcmsg};
use netlink_bindings::traits::{NetlinkRequest, Protocol};
use nix::errno::Errno;

use super::interfaces::Way;
use super::{SysError, SysResult, sock_diag, socket};

/// TC_H_CLSACT: where the discipline hangs; its handle is the upper half.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const CLSACT_KIND: &CStr = c"clsact";
/// ETH_P_ALL in the byte order of the network.
const ALL_PROTOCOLS: u32 = 0x0300;
/// The filter that is asked first.
const FIRST: u32 = 1;
/// Has the kernel choose.
const ANY: u32 = 0;
/// TCA_BPF_FLAG_ACT_DIRECT: the program's answer is the verdict.
const VERDICT: u32 = 1;

/// Where filters for a way hang: TC_H_MIN_INGRESS, TC_H_MIN_EGRESS.
fn place(way: Way) -> u32 {
    CLSACT_HANDLE
        | match way {
            Way::In => 0xfff2,
            Way::Out => 0xfff3,
        }
}

/// A filter at an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    interface: u32,
    way: Way,
    /// Its priority, and the protocol that it is for.
    info: u32,
    handle: u32,
    /// Name and number of its program; `None` if it is no eBPF program.
    pub program: Option<(String, u32)>,
}

/// Traffic control of this network namespace.
#[derive(Debug)]
pub struct Traffic(OwnedFd);

impl Traffic {
    /// Opens it.
    pub fn open() -> SysResult<Self> {
        socket::new(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).map(Self)
    }

    fn ask(
        &self,
        what: &'static str,
        flags: u16,
        request: &impl NetlinkRequest,
        each: impl FnMut(&[u8]) -> Option<()>,
    ) -> SysResult<()> {
        let Protocol::Raw { request_type, .. } = request.protocol() else {
            return Err(SysError::new("rtnetlink", what, Errno::EPROTO));
        };
        let (flags, call) = (request.flags() | flags, ("rtnetlink", what));
        sock_diag::ask_by(self.0.as_fd(), call, request_type, flags, request.payload(), each)
    }

    fn change(&self, what: &'static str, request: &impl NetlinkRequest) -> SysResult<()> {
        self.ask(what, sock_diag::ACK, request, |_| Some(()))
    }

    /// The interfaces that filters can be put at, whoever made that so.
    pub fn prepared(&self) -> SysResult<BTreeSet<u32>> {
        let mut found = BTreeSet::new();
        let request = Request::new().op_getqdisc_dump(&Tcmsg::new());
        let asked = self.ask("queueing disciplines", sock_diag::DUMP, &request, |message| {
            let (about, attributes) = OpGetqdiscDump::decode_reply(message);
            if attributes.get_kind().is_ok_and(|kind| kind == CLSACT_KIND) {
                found.insert(about.ifindex as u32);
            }
            Some(())
        });
        match asked {
            // A kernel without traffic control.
            Err(e) if e.errno == Errno::EOPNOTSUPP => Ok(found),
            other => other.map(|()| found),
        }
    }

    /// Makes it so that filters can be put at an interface.
    pub fn prepare(&self, interface: u32) -> SysResult<()> {
        let mut request = Request::new().set_create().set_excl().op_newqdisc_do(&discipline(interface));
        request.encode().push_kind(CLSACT_KIND);
        self.change("the discipline clsact", &request)
    }

    /// Takes that back. It takes filters along.
    pub fn restore(&self, interface: u32) -> SysResult<()> {
        self.change("the discipline clsact", &Request::new().op_delqdisc_do(&discipline(interface)))
    }

    /// Puts a program at an interface, where it decides on all packets before others do if it can.
    pub fn add(&self, interface: u32, way: Way, program: BorrowedFd<'_>, name: &CStr) -> SysResult<()> {
        let add = |priority| {
            let mut request = Request::new().set_create().set_excl().op_newtfilter_do(&Tcmsg {
                ifindex: interface as i32,
                parent: place(way),
                info: priority << 16 | ALL_PROTOCOLS,
                ..Tcmsg::new()
            });
            let about = request.encode().nested_options_bpf();
            about.push_fd(program.as_raw_fd() as u32).push_name(name).push_flags(VERDICT).end_nested();
            self.change("a filter", &request)
        };
        match add(FIRST) {
            // A filter of another kind has this place.
            Err(e) if e.errno == Errno::EINVAL => add(ANY),
            other => other,
        }
    }

    /// All filters of an interface, both ways. None of one that is gone.
    pub fn filters(&self, interface: u32) -> SysResult<Vec<Filter>> {
        let mut found = Vec::new();
        for way in Way::BOTH {
            let of = Tcmsg { ifindex: interface as i32, parent: place(way), ..Tcmsg::new() };
            let asked = self.ask("filters", sock_diag::DUMP, &Request::new().op_gettfilter_dump(&of), |message| {
                let (about, attributes) = OpGettfilterDump::decode_reply(message);
                let program = match attributes.get_options() {
                    Ok(OptionsMsg::Bpf(bpf)) => bpf.get_name().ok().zip(bpf.get_id().ok()),
                    _ => None,
                };
                let program = program.map(|(name, id)| (name.to_string_lossy().into_owned(), id));
                found.push(Filter { interface, way, info: about.info, handle: about.handle, program });
                Some(())
            });
            match asked {
                Err(e) if [Errno::ENODEV, Errno::EINVAL].contains(&e.errno) => {}
                other => other?,
            }
        }
        // Each place in the order of filters has an entry of its own, without a handle.
        found.retain(|filter| filter.handle != 0);
        Ok(found)
    }

    /// Takes a filter away, if it is still there.
    pub fn remove(&self, filter: &Filter) -> SysResult<()> {
        let Filter { interface, way, info, handle, .. } = *filter;
        let of = Tcmsg { ifindex: interface as i32, parent: place(way), info, handle, ..Tcmsg::new() };
        match self.change("a filter", &Request::new().op_deltfilter_do(&of)) {
            Err(e) if [Errno::ENOENT, Errno::ENODEV, Errno::EINVAL].contains(&e.errno) => Ok(()),
            other => other,
        }
    }
}

fn discipline(interface: u32) -> Tcmsg {
    Tcmsg { ifindex: interface as i32, parent: CLSACT, handle: CLSACT_HANDLE, ..Tcmsg::new() }
}
