//! The course of a connection's way back: which steps, in which order, for each state. Pure: made from an image alone.
//!
//! | phase | the gate | the tasks | what it is for |
//! | --- | --- | --- | --- |
//! | make | closed | do not exist | the socket, in repair mode: closed in it, it dies without a word |
//! | release | closed | ready | out of repair mode; what is new to the peer is queued for it |
//! | resume | open | ready | what was queued goes out, and the peer hears that we are there |
//!
//! How much of the end of a connection was said is said again: our FIN by shutdown(2), the peer's by a packet of our own
//! that comes from the peer's address and carries the mark.

use std::ops::Range;
use std::time::Duration;

use super::read::TcpError;
use super::state::{Numbers, State};
use crate::image::proto::{TcpStreamEntry, TlsEntry};
use crate::kernel::tcp::{Negotiated, Queue, Repair, Window, options};

/// What a packet says besides what it acknowledges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flag {
    /// Nothing.
    None,
    /// That its side of the stream ends here.
    Fin,
    /// That there is no such connection.
    Reset,
}

/// A packet without data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// What it says besides.
    pub flag: Flag,
    /// Its number.
    pub seq: u32,
    /// What it acknowledges.
    pub ack: u32,
    /// The window in it, as it stands there.
    pub window: u16,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Into repair mode, or out of it.
    Repair(Repair),
    /// bind(2) to our end.
    Bind,
    /// A queue begins with this number.
    Begin(Queue, u32),
    /// The largest segment to send; 0 for whatever the path takes.
    Segments(u32),
    /// Windows are never larger than a packet can say without a scale.
    Unscaled,
    /// connect(2) to the peer's end, in repair mode: at once.
    Connect,
    /// connect(2) to the peer's end, out of repair mode: not waited for.
    Request,
    /// What was agreed on.
    Agree(Negotiated),
    /// Where timestamps go on.
    Timestamp(u32),
    /// These of the data belong into a queue.
    Fill(Queue, Range<usize>),
    /// The windows.
    Window(Window),
    /// From here on the kernel encrypts it.
    Encrypt(TlsEntry),
    /// A FIN of ours that counts as sent.
    FinAsSent,
    /// These of the data are written, as the program would.
    Write(Range<usize>),
    /// Our FIN.
    Fin,
    /// A packet to us, as if from the peer.
    FromPeer(Segment),
    /// A byte that was acknowledged long ago, in the send queue.
    Acknowledged,
    /// The same byte, and the kernel takes it for sent just now. The gate swallows it; without a gate it goes to the peer,
    /// who takes it for one that asks whether he is still there.
    Sent,
    /// Until it was sent so long ago.
    Wait(Duration),
    /// The peer's acknowledgement of that byte, which gives back this timestamp: by it the kernel knows how long a
    /// round trip takes.
    Sample(Segment, u32),
    /// These of the data are sent to the peer once more, from the segment's number on, with this timestamp.
    Again(Segment, Range<usize>, Option<u32>),
    /// What is queued goes out now.
    Push,
    /// A packet to the peer.
    ToPeer(Segment),
}

/// All steps of a connection's way back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Course {
    /// Makes the socket.
    pub make: Vec<Step>,
    /// Before anything of the tree runs.
    pub release: Vec<Step>,
    /// When packets pass again.
    pub resume: Vec<Step>,
}

/// Whether nobody waits for anything: nothing is under way, nothing is to be sent, and all that came was acknowledged.
/// Then `resume` can be left out if no packet was held meanwhile.
pub fn is_quiet(state: State, stream: &TcpStreamEntry) -> bool {
    matches!(state, State::Established | State::CloseWait | State::FinWait2)
        && stream.outq_len == 0
        && stream.rcv_wup == Some(stream.inq_seq)
}

impl Course {
    /// The course for a state and its numbers.
    pub fn of(state: State, stream: &TcpStreamEntry) -> Result<Self, TcpError> {
        let numbers = Numbers::of(state, stream)?;
        if state == State::SynSent {
            return Ok(Self::syn_sent(numbers));
        }
        let from = Packets { numbers, stream };
        let trip = Trip::of(state, stream);
        let mut course = Self { make: connected(state, stream, numbers, trip), ..Self::default() };
        if let Some(Trip::Lasts(time)) = trip {
            course.release.extend([Step::Wait(time), Step::FromPeer(from.ack_of_data(state))]);
        }
        let unsent = stream.inq_len as usize + stream.sent()..stream.payload();
        let writes = !unsent.is_empty();
        course.release.push(Step::Repair(Repair::Off));
        if writes {
            course.release.push(Step::Write(unsent));
        }
        course.close(state, &from, trip);
        if state != State::Close {
            course.resume.extend(from.nudges(state));
            course.resume.push(Step::Push);
        }
        Ok(course)
    }

    /// Says again what was said of the connection's end: the rows of the state table.
    fn close(&mut self, state: State, packets: &Packets<'_>, trip: Option<Trip>) {
        // A byte whose acknowledgement is waited for is not acknowledged by the way.
        let waited = u32::from(matches!(trip, Some(Trip::Lasts(_))));
        let fin = packets.peer_fin();
        let early_fin = Step::FromPeer(Segment { ack: fin.ack.wrapping_sub(waited), ..fin });
        match state {
            State::Established | State::SynSent => {}
            State::CloseWait => self.make.push(early_fin),
            State::FinWait1 => self.release.push(Step::Fin),
            State::FinWait2 => self.make.extend([Step::FinAsSent, Step::FromPeer(packets.ack_of_fin(0))]),
            State::Closing => self.release.extend([Step::Fin, Step::FromPeer(fin)]),
            State::LastAck => {
                self.make.push(early_fin);
                self.release.push(Step::Fin);
            }
            // Numbers of a connection that was reset are nobody's any more, so they may be counted as of one that ended.
            State::Close if packets.stream.reset() => self.make.push(Step::FromPeer(packets.reset())),
            State::Close => {
                self.make.extend([Step::FromPeer(fin), Step::FinAsSent, Step::FromPeer(packets.ack_of_fin(1))])
            }
        }
    }

    /// The request for the connection is made again, with the number that it had: the gate swallows it, and the kernel
    /// repeats it until it is answered.
    fn syn_sent(numbers: Numbers) -> Self {
        let make = vec![
            Step::Repair(Repair::On),
            Step::Bind,
            Step::Begin(Queue::Send, numbers.sent_from),
            Step::Repair(Repair::Off),
            Step::Request,
        ];
        Self { make, ..Self::default() }
    }
}

/// TCP_MAXSEG takes no more: MAX_TCP_WINDOW of include/net/tcp.h.
const SEGMENTS_MAX: u32 = 32767;

/// A connected socket in repair mode, with everything in its queues that was sent or received.
fn connected(state: State, stream: &TcpStreamEntry, numbers: Numbers, trip: Option<Trip>) -> Vec<Step> {
    let received = stream.inq_len as usize;
    let sent = received..received + stream.sent();
    let window = window(state, stream).map(Step::Window);
    let mut steps = vec![
        Step::Repair(Repair::On),
        Step::Bind,
        Step::Begin(Queue::Receive, numbers.received_from),
        Step::Begin(Queue::Send, numbers.sent_from.wrapping_sub(trip.is_some().into())),
        // The kernel works out how large segments are when it connects, and by what was agreed on only if it is told
        // now (tcp_connect_init in net/ipv4/tcp_output.c): else they would stay at the 536 bytes that everybody takes.
        Step::Segments(stream.mss_clamp.min(SEGMENTS_MAX)),
    ];
    // When it connects, the kernel chooses a scale for our windows as well, and keeps it where none was agreed on: the
    // peer would be offered a hundredth of them. It chooses none for windows that need none, and limits them likewise
    // where a peer refuses scales (tcp_rcv_synsent_state_process in net/ipv4/tcp_input.c).
    steps.extend((!option(stream, options::WSCALE)).then_some(Step::Unscaled));
    steps.extend([Step::Connect, Step::Segments(0), Step::Agree(negotiated(stream))]);
    steps.extend(stream.timestamp.map(Step::Timestamp));
    if received > 0 {
        steps.push(Step::Fill(Queue::Receive, 0..received));
    }
    match trip {
        Some(Trip::Echo(_)) => steps.push(Step::Acknowledged),
        Some(Trip::Lasts(_)) => {
            steps.extend(window.clone());
            steps.extend([Step::Repair(Repair::Off), Step::Sent, Step::Repair(Repair::On)]);
        }
        None => {}
    }
    if !sent.is_empty() {
        steps.push(Step::Fill(Queue::Send, sent));
    }
    if let Some(Trip::Echo(echo)) = trip {
        steps.push(Step::Sample(Packets { numbers, stream }.peer_ack(), echo));
    }
    steps.extend(window);
    steps.extend(stream.tls.clone().map(Step::Encrypt));
    steps
}

/// The lowest bit of TCP_TIMESTAMP is none of the time: it says that timestamps are in microseconds.
const MICROSECONDS: u32 = 1;

/// How the kernel learns how long a round trip takes. A connection that is made in repair mode has no round-trip time:
/// what is lost of it would be sent again after three seconds (TCP_TIMEOUT_FALLBACK in `tcp_init_metrics` of
/// net/ipv4/tcp_metrics.c), then after six. The kernel measures by what is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trip {
    /// The acknowledgement of what was put into the queue in repair mode gives back the timestamp of as long ago.
    Echo(u32),
    /// Without timestamps nothing is measured of that, nor of anything that was sent twice: one byte is sent, and
    /// acknowledged so much later.
    Lasts(Duration),
}

impl Trip {
    /// Who is much farther away than this has to measure it by itself: a restore waits no longer.
    const LONGEST: Duration = Duration::from_secs(1);

    /// Of a connection that has something under way.
    fn of(state: State, stream: &TcpStreamEntry) -> Option<Self> {
        let micros = stream.rtt.filter(|_| stream.sent() > 0)?;
        if let Some(stamp) = stream.timestamp {
            let ticks = if stamp & MICROSECONDS != 0 { micros } else { micros.div_ceil(1000) };
            return Some(Self::Echo((stamp & !MICROSECONDS).wrapping_sub(ticks)));
        }
        // Who may send nothing, by what the peer takes, cannot send that byte.
        let may = state != State::Close && window(state, stream).is_some_and(|window| window.snd_wnd > 0);
        may.then(|| Self::Lasts(Duration::from_micros(micros.into()).min(Self::LONGEST)))
    }
}

fn option(stream: &TcpStreamEntry, option: u8) -> bool {
    stream.opt_mask & u32::from(option) != 0
}

fn negotiated(stream: &TcpStreamEntry) -> Negotiated {
    let scaled = option(stream, options::WSCALE);
    Negotiated {
        mss_clamp: stream.mss_clamp,
        scales: scaled.then_some((stream.snd_wscale as u8, stream.rcv_wscale() as u8)),
        sack: option(stream, options::SACK),
        timestamps: option(stream, options::TIMESTAMPS),
    }
}

/// The windows, where the image has all of them. A FIN that is about to come again needs the room that it had.
fn window(state: State, stream: &TcpStreamEntry) -> Option<Window> {
    let fin = u32::from(state.has_received_fin());
    Some(Window {
        snd_wl1: stream.snd_wl1?.wrapping_sub(fin),
        snd_wnd: stream.snd_wnd?,
        max_window: stream.max_window?.max(stream.snd_wnd?),
        rcv_wnd: stream.rcv_wnd?.saturating_add(fin),
        rcv_wup: stream.rcv_wup?.wrapping_sub(fin),
    })
}

/// The packets that a connection's way back may need.
pub(super) struct Packets<'a> {
    /// The stream's.
    pub(super) numbers: Numbers,
    /// The connection.
    pub(super) stream: &'a TcpStreamEntry,
}

impl Packets<'_> {
    /// The window that the peer offers, as it stands in its packets.
    fn peers_window(&self) -> u16 {
        scaled(self.stream.snd_wnd.unwrap_or(u16::MAX.into()), self.stream.snd_wscale)
    }

    /// The peer's FIN. It acknowledges what the peer had acknowledged.
    pub(super) fn peer_fin(&self) -> Segment {
        let Numbers { received_to, sent_from, .. } = self.numbers;
        Segment { flag: Flag::Fin, seq: received_to, ack: sent_from, window: self.peers_window() }
    }

    /// The peer's acknowledgement of our FIN, behind `before` FINs of its own.
    fn ack_of_fin(&self, before: u32) -> Segment {
        let (seq, ack) = (self.numbers.received_to.wrapping_add(before), self.numbers.written_to.wrapping_add(1));
        Segment { flag: Flag::None, seq, ack, window: self.peers_window() }
    }

    /// What the peer had acknowledged, acknowledged once more.
    fn peer_ack(&self) -> Segment {
        Segment { flag: Flag::None, ..self.peer_fin() }
    }

    /// The same, where the peer's FIN has come again meanwhile.
    fn ack_of_data(&self, state: State) -> Segment {
        let fin = u32::from(state.has_received_fin());
        Segment { seq: self.numbers.received_to.wrapping_add(fin), ..self.peer_ack() }
    }

    /// The peer's word that it knows of no connection.
    pub(super) fn reset(&self) -> Segment {
        Segment { flag: Flag::Reset, ..self.peer_fin() }
    }

    /// What tells the peer that we are there. It acknowledges everything once more, as the first acknowledgement may
    /// have been dropped by the gate, and what the peer could not send meanwhile it sends now. What of ours is on its way
    /// is sent once more: the peer says how much of it has come, and is not kept waiting for what the gate has dropped.
    fn nudges(&self, state: State) -> Vec<Step> {
        let fin = u32::from(state == State::FinWait2);
        let ack = self.numbers.received_to.wrapping_add(state.has_received_fin().into());
        let window = scaled(self.stream.rcv_wnd.unwrap_or(u16::MAX.into()), self.stream.rcv_wscale());
        let segment = |seq: u32| Step::ToPeer(Segment { flag: Flag::None, seq, ack, window });
        let mut steps = vec![segment(self.numbers.sent_to.wrapping_add(fin))];
        let received = self.stream.inq_len as usize;
        let sent = received..received + self.stream.sent();
        if !sent.is_empty() {
            let first = Segment { flag: Flag::None, seq: self.numbers.sent_from, ack, window };
            // Not before any that the peer has seen, and not behind those that the socket begins with.
            let stamp = self.stream.timestamp.map(|stamp| stamp | MICROSECONDS);
            steps.push(Step::Again(first, sent, stamp));
        }
        steps
    }
}

/// A window as it stands in packets.
pub(super) fn scaled(window: u32, scale: u32) -> u16 {
    u16::try_from(window.checked_shr(scale).unwrap_or(0)).unwrap_or(u16::MAX)
}

impl TcpStreamEntry {
    /// How many bytes both queues hold.
    fn payload(&self) -> usize {
        self.inq_len as usize + self.outq_len as usize
    }

    /// How many of these are on their way to the peer.
    fn sent(&self) -> usize {
        (self.outq_len - self.unsq_len()) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> TcpStreamEntry {
        TcpStreamEntry {
            inq_len: 10,
            inq_seq: 1010,
            outq_len: 30,
            outq_seq: 2030,
            unsq_len: Some(20),
            opt_mask: u32::from(options::WSCALE | options::TIMESTAMPS),
            snd_wscale: 7,
            rcv_wscale: Some(8),
            mss_clamp: 1460,
            timestamp: Some(76),
            snd_wl1: Some(1010),
            snd_wnd: Some(65535),
            max_window: Some(65535),
            rcv_wnd: Some(512),
            rcv_wup: Some(1010),
            ..TcpStreamEntry::default()
        }
    }

    fn course(state: State) -> Course {
        Course::of(state, &stream()).unwrap()
    }

    /// What of a course is about the connection's end, in order.
    fn ending(state: State) -> Vec<&'static str> {
        let course = course(state);
        let names = course.make.iter().chain(&course.release).filter_map(|step| match step {
            Step::Fin => Some("fin"),
            Step::FinAsSent => Some("fin as sent"),
            Step::FromPeer(segment) => Some(match segment.flag {
                Flag::None => "ack",
                Flag::Fin => "peer's fin",
                Flag::Reset => "reset",
            }),
            _ => None,
        });
        names.collect()
    }

    #[test]
    fn an_established_connection() {
        let course = course(State::Established);
        let agreed = Negotiated { mss_clamp: 1460, scales: Some((7, 8)), sack: false, timestamps: true };
        let window = Window { snd_wl1: 1010, snd_wnd: 65535, max_window: 65535, rcv_wnd: 512, rcv_wup: 1010 };
        let make = vec![
            Step::Repair(Repair::On),
            Step::Bind,
            Step::Begin(Queue::Receive, 1000),
            Step::Begin(Queue::Send, 2000),
            Step::Segments(1460),
            Step::Connect,
            Step::Segments(0),
            Step::Agree(agreed),
            Step::Timestamp(76),
            Step::Fill(Queue::Receive, 0..10),
            Step::Fill(Queue::Send, 10..20),
            Step::Window(window),
        ];
        assert_eq!(course.make, make);
        assert_eq!(course.release, [Step::Repair(Repair::Off), Step::Write(20..40)]);
        let nudge = |seq| Step::ToPeer(Segment { flag: Flag::None, seq, ack: 1010, window: 2 });
        let again = Segment { flag: Flag::None, seq: 2000, ack: 1010, window: 2 };
        assert_eq!(course.resume, [nudge(2010), Step::Again(again, 10..20, Some(77)), Step::Push]);
    }

    #[test]
    fn round_trips_take_as_long_as_they_did() {
        let course = Course::of(State::Established, &TcpStreamEntry { rtt: Some(12_300), ..stream() }).unwrap();
        assert!(course.make.contains(&Step::Begin(Queue::Send, 1999)), "{:?}", course.make);
        let ack = Segment { flag: Flag::None, seq: 1010, ack: 2000, window: 511 };
        let place = course.make.iter().position(|step| *step == Step::Acknowledged).unwrap();
        let next = [Step::Fill(Queue::Send, 10..20), Step::Sample(ack, 76 - 13)];
        assert_eq!(course.make[place + 1..place + 3], next);
        let idle = TcpStreamEntry { outq_len: 0, unsq_len: Some(0), rtt: Some(12_300), ..stream() };
        assert!(!Course::of(State::Established, &idle).unwrap().make.contains(&Step::Acknowledged));
        let micros = TcpStreamEntry { timestamp: Some(100_001), rtt: Some(500), ..stream() };
        assert_eq!(Trip::of(State::Established, &micros), Some(Trip::Echo(99_500)));
        assert_eq!(Trip::of(State::Established, &stream()), None);
    }

    #[test]
    fn without_timestamps_a_byte_makes_the_round_trip() {
        let stream = TcpStreamEntry { timestamp: None, opt_mask: 0, snd_wscale: 0, rtt: Some(12_300), ..stream() };
        let course = |state| Course::of(state, &stream).unwrap();
        let Course { make, release, .. } = course(State::Established);
        assert!(make.contains(&Step::Begin(Queue::Send, 1999)), "{make:?}");
        let place = make.iter().position(|step| *step == Step::Sent).unwrap();
        let window = Window { snd_wl1: 1010, snd_wnd: 65535, max_window: 65535, rcv_wnd: 512, rcv_wup: 1010 };
        assert_eq!(make[place - 2..place], [Step::Window(window), Step::Repair(Repair::Off)]);
        let rest = [Step::Repair(Repair::On), Step::Fill(Queue::Send, 10..20), Step::Window(window)];
        assert_eq!(make[place + 1..], rest);
        let ack = |seq| Step::FromPeer(Segment { flag: Flag::None, seq, ack: 2000, window: u16::MAX });
        assert_eq!(release[..2], [Step::Wait(Duration::from_micros(12_300)), ack(1010)]);
        // The peer's FIN does not acknowledge that byte, and takes a number.
        let fin = Segment { flag: Flag::Fin, seq: 1009, ack: 1999, window: u16::MAX };
        assert_eq!(course(State::CloseWait).make.last(), Some(&Step::FromPeer(fin)));
        assert_eq!(course(State::CloseWait).release[1], ack(1010));
        assert!(!course(State::Close).make.contains(&Step::Sent));
        let shut = TcpStreamEntry { snd_wnd: Some(0), ..stream.clone() };
        assert_eq!(Trip::of(State::Established, &shut), None);
        let far = TcpStreamEntry { rtt: Some(3_000_000), ..stream };
        assert_eq!(Trip::of(State::Established, &far), Some(Trip::Lasts(Duration::from_secs(1))));
    }

    #[test]
    fn ends_are_said_again_in_the_order_of_the_table() {
        assert_eq!(ending(State::Established), [""; 0]);
        assert_eq!(ending(State::CloseWait), ["peer's fin"]);
        assert_eq!(ending(State::FinWait1), ["fin"]);
        assert_eq!(ending(State::FinWait2), ["fin as sent", "ack"]);
        assert_eq!(ending(State::Closing), ["fin", "peer's fin"]);
        assert_eq!(ending(State::LastAck), ["peer's fin", "fin"]);
        assert_eq!(ending(State::Close), ["peer's fin", "fin as sent", "ack"]);
    }

    #[test]
    fn a_reset_comes_again() {
        let course = Course::of(State::Close, &TcpStreamEntry { reset: Some(true), ..stream() }).unwrap();
        let reset = |step: &Step| matches!(step, Step::FromPeer(Segment { flag: Flag::Reset, seq: 1009, .. }));
        assert!(course.make.last().is_some_and(reset), "{:?}", course.make);
    }

    #[test]
    fn a_fin_that_comes_again_has_its_number_and_room() {
        let course = course(State::CloseWait);
        let fin = Segment { flag: Flag::Fin, seq: 1009, ack: 2000, window: 511 };
        assert_eq!(course.make.last(), Some(&Step::FromPeer(fin)));
        let windows = |step: &Step| matches!(step, Step::Window(w) if w.rcv_wnd == 513 && w.rcv_wup == 1009);
        assert!(course.make.iter().any(windows), "{:?}", course.make);
    }

    #[test]
    fn our_fin_is_acknowledged_behind_our_data() {
        let stream = TcpStreamEntry { outq_len: 0, unsq_len: Some(0), ..stream() };
        let course = Course::of(State::FinWait2, &stream).unwrap();
        let ack = Segment { flag: Flag::None, seq: 1010, ack: 2030, window: 511 };
        assert_eq!(course.make.last(), Some(&Step::FromPeer(ack)));
    }

    #[test]
    fn who_waits_for_nothing_is_quiet() {
        let idle = TcpStreamEntry { outq_len: 0, unsq_len: Some(0), ..stream() };
        for state in State::ALL {
            let expected = matches!(state, State::Established | State::CloseWait | State::FinWait2);
            assert_eq!(is_quiet(state, &idle), expected, "{state:?}");
            assert!(!is_quiet(state, &stream()), "{state:?}, with bytes under way");
        }
        let late = TcpStreamEntry { rcv_wup: Some(1009), ..idle };
        assert!(!is_quiet(State::Established, &late), "an acknowledgement is due");
    }

    #[test]
    fn a_request_goes_out_with_its_own_number() {
        let course = course(State::SynSent);
        assert!(course.make.contains(&Step::Begin(Queue::Send, 1999)), "{:?}", course.make);
        assert_eq!(course.make.last(), Some(&Step::Request));
        assert!(course.release.is_empty() && course.resume.is_empty());
    }

    #[test]
    fn what_was_not_agreed_on_is_not_set() {
        let stream = TcpStreamEntry { opt_mask: u32::from(options::SACK), ..stream() };
        let agreed = Negotiated { mss_clamp: 1460, scales: None, sack: true, timestamps: false };
        assert_eq!(negotiated(&stream), agreed);
        let make = Course::of(State::Established, &stream).unwrap().make;
        let at = |step: Step| make.iter().position(|made| *made == step);
        assert!(at(Step::Unscaled) < at(Step::Connect) && make.contains(&Step::Unscaled), "{make:?}");
    }
}
