//! What the gate and the engine share: which connections are held, and how many packets were.

/// A TCP connection, by its two ends. IPv4 addresses are mapped (`::ffff:a.b.c.d`), so that a socket that talks IPv4
/// through IPv6 is found as well. Ports are as packets have them, the high byte first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Connection {
    /// Our address.
    pub local: [u8; 16],
    /// The peer's.
    pub remote: [u8; 16],
    /// Our port.
    pub local_port: [u8; 2],
    /// The peer's.
    pub remote_port: [u8; 2],
}

impl Connection {
    /// What stands for all that ask for a connection with this end: nobody's other end. An address of 127/8 is
    /// 127.0.0.1.
    #[inline(always)]
    pub const fn asking(mut local: [u8; 16], local_port: [u8; 2]) -> Self {
        if is_mapped(&local) && local[12] == 127 {
            local = mapped([127, 0, 0, 1]);
        }
        Self { local, remote: [0; 16], local_port, remote_port: [0; 2] }
    }

    /// Nobody's. Where it is taken out, everything passes.
    pub const CLOSED: Self = Self::nobody(0);

    /// Nobody's. What is held of any connection counts for this as well.
    pub const ANY: Self = Self::nobody(1);

    const fn nobody(number: u8) -> Self {
        Self { local: [0; 16], remote: [0xff; 16], local_port: [0; 2], remote_port: [0, number] }
    }

    /// Whether it stands for something else than packets of somebody's.
    pub fn is_nobody(&self) -> bool {
        *self == Self::CLOSED || *self == Self::ANY
    }

    /// The connection as the other end sees it.
    #[inline(always)]
    pub const fn swapped(&self) -> Self {
        Self { local: self.remote, remote: self.local, local_port: self.remote_port, remote_port: self.local_port }
    }

    /// Whether it stands for all that ask.
    pub fn is_asking(&self) -> bool {
        (self.remote, self.remote_port) == ([0; 16], [0; 2])
    }
}

/// Packets of a connection that the gate has dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// From the peer.
    pub from_peer: u64,
    /// To the peer.
    pub to_peer: u64,
}

/// The mark of packets that pass: the one that CRIU uses, whose own rules let it pass as well.
pub const MARK: u32 = 0xc114;

/// The mark of packets to a peer that the gate drops, and its sender takes for sent.
pub const SWALLOWED: u32 = MARK + 1;

/// How many connections one gate can hold.
pub const MOST: u32 = 1 << 16;

/// An IPv4 address as an IPv6 socket sees it.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

/// Whether an address is an IPv4 address that is mapped.
#[inline(always)]
const fn is_mapped(address: &[u8; 16]) -> bool {
    let mut at = 0;
    while at < 10 {
        if address[at] != 0 {
            return false;
        }
        at += 1;
    }
    address[10] == 0xff && address[11] == 0xff
}

/// The bytes of a record, as a map of the kernel's has them.
pub fn bytes(connection: &Connection) -> [u8; 36] {
    let mut out = [0; 36];
    out[..16].copy_from_slice(&connection.local);
    out[16..32].copy_from_slice(&connection.remote);
    out[32..34].copy_from_slice(&connection.local_port);
    out[34..].copy_from_slice(&connection.remote_port);
    out
}

/// The record that these bytes are.
pub fn from_bytes(bytes: &[u8; 36]) -> Connection {
    let mut out = Connection::default();
    out.local.copy_from_slice(&bytes[..16]);
    out.remote.copy_from_slice(&bytes[16..32]);
    out.local_port.copy_from_slice(&bytes[32..34]);
    out.remote_port.copy_from_slice(&bytes[34..]);
    out
}
