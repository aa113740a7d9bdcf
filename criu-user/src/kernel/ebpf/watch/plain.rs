//! Records as aya wants them: it reads and writes bytes, and asks for a promise that any will do.

use aya::Pod;

/// A record that any bytes of its size are a value of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

macro_rules! plain {
    ($($record:ty),* $(,)?) => {
        $(
            // SAFETY: `repr(C)`, of numbers alone; its padding is named.
            unsafe impl Pod for Plain<$record> {}
        )*
    };
}

plain! {
    criu_common::watch::BlockKey,
    criu_common::watch::Faults,
    criu_common::watch::Group,
    criu_common::watch::Process,
    criu_common::watch::offsets::Offsets,
}

/// Records that the engine takes out of bytes.
pub trait Record: Copy {}

macro_rules! record {
    ($($record:ident),* $(,)?) => { $(impl Record for criu_common::watch::$record {})* };
}

record! { Header, Fork, Exec, Exit, Block, Call, SocketState, Moved, Followed, Socket }

/// The record that these bytes begin with.
pub fn read<T: Record>(bytes: &[u8]) -> Option<T> {
    // SAFETY: as long as the record, and any bytes are a value of those that implement `Record`.
    bytes.get(..size_of::<T>()).map(|bytes| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
