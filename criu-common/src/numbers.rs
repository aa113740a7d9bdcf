//! Where TCP connections stand in their streams: the record of `criu-ebpf/src/numbers.rs`.

/// A connection, as it was at one moment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Its inode.
    pub inode: u64,
    /// What CLOCK_MONOTONIC said, in nanoseconds: timestamps are counted by it.
    pub now: u64,
    /// The first byte that nobody has read.
    pub copied_seq: u32,
    /// The byte that comes next.
    pub rcv_nxt: u32,
    /// What we have acknowledged last.
    pub rcv_wup: u32,
    /// The window that we have offered, in bytes from `rcv_wup` on.
    pub rcv_wnd: u32,
    /// What was not acknowledged of what we sent.
    pub snd_una: u32,
    /// The end of what was written.
    pub write_seq: u32,
    /// The segment that last changed the window that the peer offers.
    pub snd_wl1: u32,
    /// That window, in bytes.
    pub snd_wnd: u32,
    /// The largest that it ever was.
    pub max_window: u32,
    /// The smoothed round-trip time, in eighths of a microsecond.
    pub srtt: u32,
    /// What is added to the clock for our timestamps.
    pub ts_offset: u32,
    /// The largest segment that the peer takes.
    pub mss: u16,
    /// As in `TCP_ESTABLISHED`.
    pub state: u8,
    /// 1 where something came while this was read: it may not fit together.
    pub torn: u8,
}

impl Numbers {
    /// One from bytes as they stand in memory.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        let long = |at: usize| bytes[at..].first_chunk().map_or(0, |chunk| u64::from_ne_bytes(*chunk));
        let word = |n: usize| bytes[16 + n * 4..].first_chunk().map_or(0, |chunk| u32::from_ne_bytes(*chunk));
        Self {
            inode: long(0),
            now: long(8),
            copied_seq: word(0),
            rcv_nxt: word(1),
            rcv_wup: word(2),
            rcv_wnd: word(3),
            snd_una: word(4),
            write_seq: word(5),
            snd_wl1: word(6),
            snd_wnd: word(7),
            max_window: word(8),
            srtt: word(9),
            ts_offset: word(10),
            mss: u16::from_ne_bytes([bytes[60], bytes[61]]),
            state: bytes[62],
            torn: bytes[63],
        }
    }
}

crate::offsets::offsets! {
    task_group_leader: needed "task_struct" "group_leader";
    file_inode: needed "file" "f_inode";
    file_private_data: needed "file" "private_data";
    inode_ino: needed "inode" "i_ino";
    inode_mode: needed "inode" "i_mode";
    socket_sk: needed "socket" "sk";
    sock_family: needed "sock" "__sk_common.skc_family";
    sock_state: needed "sock" "__sk_common.skc_state";
    sock_protocol: needed "sock" "sk_protocol";
    mptcp_first: optional "mptcp_sock" "first";
    tcp_copied_seq: needed "tcp_sock" "copied_seq";
    tcp_rcv_nxt: needed "tcp_sock" "rcv_nxt";
    tcp_rcv_wup: needed "tcp_sock" "rcv_wup";
    tcp_rcv_wnd: needed "tcp_sock" "rcv_wnd";
    tcp_snd_una: needed "tcp_sock" "snd_una";
    tcp_write_seq: needed "tcp_sock" "write_seq";
    tcp_snd_wl1: needed "tcp_sock" "snd_wl1";
    tcp_snd_wnd: needed "tcp_sock" "snd_wnd";
    tcp_max_window: needed "tcp_sock" "max_window";
    tcp_srtt: needed "tcp_sock" "srtt_us";
    tcp_ts_offset: needed "tcp_sock" "tsoffset";
    tcp_mss: needed "tcp_sock" "rx_opt.mss_clamp";
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn a_record_is_read_where_its_fields_are() {
        let mut bytes = [0; size_of::<Numbers>()];
        bytes[offset_of!(Numbers, now)] = 2;
        bytes[offset_of!(Numbers, copied_seq)] = 3;
        bytes[offset_of!(Numbers, write_seq)] = 4;
        bytes[offset_of!(Numbers, ts_offset)] = 5;
        bytes[offset_of!(Numbers, mss)] = 6;
        bytes[offset_of!(Numbers, state)] = 7;
        bytes[offset_of!(Numbers, torn)] = 1;
        let expected = Numbers {
            now: 2,
            copied_seq: 3,
            write_seq: 4,
            ts_offset: 5,
            mss: 6,
            state: 7,
            torn: 1,
            ..Numbers::default()
        };
        assert_eq!(Numbers::from_bytes(&bytes), expected);
    }
}
