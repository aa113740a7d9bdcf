//! The one shape of a failed system call.

use nix::errno::Errno;

/// A system call that the kernel refused: which one, on what, and its errno.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{call}({on}): {}", errno.desc())]
pub struct SysError {
    /// Name of the system call, or of the file operation that stands for it.
    pub call: &'static str,
    /// What it was called on, for a reader: a pid, a path, a descriptor.
    pub on: String,
    /// What the kernel answered.
    pub errno: Errno,
}

/// Result of a kernel wrapper.
pub type SysResult<T> = Result<T, SysError>;

impl SysError {
    /// The error of `call` on `on`.
    pub fn new(call: &'static str, on: impl ToString, errno: Errno) -> Self {
        Self { call, on: on.to_string(), errno }
    }

    /// The error of a `std::io` operation, which keeps the errno inside.
    pub fn io(call: &'static str, on: impl ToString, err: &std::io::Error) -> Self {
        Self::new(call, on, err.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }
}

/// Gives a bare errno the context of its call.
pub trait During<T> {
    /// Says which call failed, and on what.
    fn during(self, call: &'static str, on: impl ToString) -> SysResult<T>;
}

impl<T> During<T> for Result<T, Errno> {
    fn during(self, call: &'static str, on: impl ToString) -> SysResult<T> {
        self.map_err(|errno| SysError::new(call, on, errno))
    }
}

impl<T> During<T> for std::io::Result<T> {
    fn during(self, call: &'static str, on: impl ToString) -> SysResult<T> {
        self.map_err(|err| SysError::io(call, on, &err))
    }
}
