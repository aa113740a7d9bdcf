//! The states of a TCP connection, and what of its numbers is data and what its end.
//!
//! A FIN takes one number of the stream, as a byte does, and the kernel counts it so: in `write_seq` once we have sent
//! ours, in `rcv_nxt` once the peer's has come. Images have the kernel's numbers, and lengths of data alone.

use super::read::TcpError;
use crate::image::proto::TcpStreamEntry;
use crate::kernel::tcp::Lengths;

/// The states that a socket of a process can be in, by the kernel's numbers (include/net/tcp_states.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum State {
    /// Both ways are open.
    Established = 1,
    /// We have asked for a connection.
    SynSent = 2,
    /// We have sent our FIN.
    FinWait1 = 4,
    /// The peer has acknowledged it.
    FinWait2 = 5,
    /// Both are at their end.
    Close = 7,
    /// The peer has sent its FIN.
    CloseWait = 8,
    /// The peer has sent its FIN, then we ours.
    LastAck = 9,
    /// We have sent our FIN, and before it was acknowledged the peer its own.
    Closing = 11,
}

impl State {
    /// All of them.
    pub const ALL: [State; 8] = [
        State::Established,
        State::SynSent,
        State::FinWait1,
        State::FinWait2,
        State::Close,
        State::CloseWait,
        State::LastAck,
        State::Closing,
    ];

    /// By the kernel's number; `None` for states of sockets that are no connection, or nobody's.
    pub fn of_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u32 == number)
    }

    /// Whether we have sent a FIN.
    pub fn has_sent_fin(self) -> bool {
        matches!(self, Self::FinWait1 | Self::FinWait2 | Self::Closing | Self::LastAck | Self::Close)
    }

    /// Whether the peer's FIN has come.
    pub fn has_received_fin(self) -> bool {
        matches!(self, Self::CloseWait | Self::LastAck | Self::Closing | Self::Close)
    }

    /// How many bytes of data the queues hold, by what the kernel says of them.
    pub fn data(self, raw: Lengths) -> Lengths {
        let less = |length: u32| if self.has_sent_fin() { length.saturating_sub(1) } else { length };
        match self {
            // Of a connection that was reset something may be left to send, but nobody to send it to.
            Self::Close => Lengths { unacknowledged: 0, unsent: 0, ..raw },
            _ => Lengths { unacknowledged: less(raw.unacknowledged), unsent: less(raw.unsent), ..raw },
        }
    }
}

/// Where the queues of a connection begin and end in the stream, FINs not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// The first byte that is still to be read.
    pub received_from: u32,
    /// Behind the last byte that has come.
    pub received_to: u32,
    /// The first byte that the peer has not acknowledged.
    pub sent_from: u32,
    /// Behind the last byte that was sent.
    pub sent_to: u32,
    /// Behind the last byte that was written.
    pub written_to: u32,
}

impl Numbers {
    /// The numbers that an image tells of.
    pub fn of(state: State, stream: &TcpStreamEntry) -> Result<Self, TcpError> {
        let unsent = stream.unsq_len();
        if unsent > stream.outq_len {
            return Err(TcpError::Lengths { unsent, written: stream.outq_len });
        }
        let received_to = stream.inq_seq.wrapping_sub(state.has_received_fin().into());
        // The number of a SYN, which is not acknowledged yet, is one before that of the first byte.
        let control = state.has_sent_fin() || state == State::SynSent;
        let written_to = stream.outq_seq.wrapping_sub(control.into());
        Ok(Self {
            received_from: received_to.wrapping_sub(stream.inq_len),
            received_to,
            sent_from: written_to.wrapping_sub(stream.outq_len),
            sent_to: written_to.wrapping_sub(unsent),
            written_to,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(inq: (u32, u32), outq: (u32, u32), unsent: u32) -> TcpStreamEntry {
        TcpStreamEntry {
            inq_len: inq.0,
            inq_seq: inq.1,
            outq_len: outq.0,
            outq_seq: outq.1,
            unsq_len: Some(unsent),
            ..TcpStreamEntry::default()
        }
    }

    #[test]
    fn queues_end_where_the_kernel_says() {
        let numbers = Numbers::of(State::Established, &stream((10, 1010), (30, 2030), 20)).unwrap();
        let expected =
            Numbers { received_from: 1000, received_to: 1010, sent_from: 2000, sent_to: 2010, written_to: 2030 };
        assert_eq!(numbers, expected);
    }

    #[test]
    fn fins_are_no_data() {
        for state in State::ALL {
            let numbers = Numbers::of(state, &stream((10, 1011), (30, 2031), 0)).unwrap();
            assert_eq!(numbers.received_to, 1011 - u32::from(state.has_received_fin()), "{state:?}");
            let control = state.has_sent_fin() || state == State::SynSent;
            assert_eq!(numbers.written_to, 2031 - u32::from(control), "{state:?}");
        }
    }

    #[test]
    fn numbers_go_round() {
        let numbers = Numbers::of(State::LastAck, &stream((5, 0), (5, 0), 5)).unwrap();
        assert_eq!((numbers.received_from, numbers.received_to), (u32::MAX - 5, u32::MAX));
        assert_eq!((numbers.sent_from, numbers.sent_to), (u32::MAX - 5, u32::MAX - 5));
    }

    #[test]
    fn lengths_count_a_fin_only_where_it_is() {
        let raw = Lengths { received: 3, unacknowledged: 8, unsent: 0 };
        assert_eq!(State::Established.data(raw), raw);
        assert_eq!(State::FinWait1.data(raw), Lengths { unacknowledged: 7, ..raw });
        assert_eq!(State::FinWait2.data(Lengths::default()), Lengths::default());
        let unsent = Lengths { unsent: 4, ..raw };
        assert_eq!(State::FinWait1.data(unsent), Lengths { unacknowledged: 7, unsent: 3, ..raw });
        assert_eq!(State::Close.data(unsent), Lengths { received: 3, ..Lengths::default() });
    }

    #[test]
    fn more_cannot_be_unsent_than_was_written() {
        assert!(Numbers::of(State::Established, &stream((0, 0), (3, 3), 4)).is_err());
    }
}
