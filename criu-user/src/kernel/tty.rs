//! What terminals are asked and told: ioctl_tty(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::{SysError, SysResult, sys};

const TCGETS2: u64 = 0x802c_542a;
const TCSETS2: u64 = 0x402c_542b;
const TCSETS: u64 = 0x5402;
const TIOCGLCKTRMIOS: u64 = 0x5456;
const TIOCSLCKTRMIOS: u64 = 0x5457;
const TIOCSTI: u64 = 0x5412;
const TIOCGDEV: u64 = 0x8004_5432;
const TIOCEXCL: u64 = 0x540c;
/// How many control characters the kernel has: NCCS of include/uapi/asm-generic/termbits.h.
pub const CONTROL_CHARACTERS: usize = 19;
/// Room for any of the kernel's termios structures; the largest has 44 bytes.
const ROOM: usize = 64;

/// Settings of a terminal: `struct termios2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settings {
    /// Input, output, control and local modes.
    pub modes: [u32; 4],
    /// Line discipline.
    pub line: u8,
    /// Control characters.
    pub characters: [u8; CONTROL_CHARACTERS],
    /// Input and output speed; 0 where only the control modes tell.
    pub speeds: [u32; 2],
}

impl Settings {
    fn from_bytes(bytes: &[u8; ROOM]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut characters = [0; CONTROL_CHARACTERS];
        characters.copy_from_slice(&bytes[17..17 + CONTROL_CHARACTERS]);
        let modes = [word(0), word(4), word(8), word(12)];
        Self { modes, line: bytes[16], characters, speeds: [word(36), word(40)] }
    }

    fn bytes(&self) -> [u8; ROOM] {
        let mut bytes = [0; ROOM];
        for (n, mode) in self.modes.iter().enumerate() {
            bytes[4 * n..4 * n + 4].copy_from_slice(&mode.to_ne_bytes());
        }
        bytes[16] = self.line;
        bytes[17..17 + CONTROL_CHARACTERS].copy_from_slice(&self.characters);
        bytes[36..40].copy_from_slice(&self.speeds[0].to_ne_bytes());
        bytes[40..44].copy_from_slice(&self.speeds[1].to_ne_bytes());
        bytes
    }

    /// Whether input is handed over by lines.
    pub fn by_lines(&self) -> bool {
        self.modes[3] & libc::ICANON != 0
    }

    /// The same terminal handing bytes on as they are, by lines or not, with reads that never wait.
    ///
    /// Flow control stays on where it is (without characters that would cause it): turning it off would let go on a
    /// terminal that was stopped (drivers/tty/n_tty.c, `n_tty_set_termios`).
    pub fn neutral(&self, by_lines: bool) -> Self {
        let lines = if by_lines { libc::ICANON } else { 0 };
        let modes = [self.modes[0] & libc::IXON, 0, self.modes[2], lines];
        Self { modes, characters: [0; CONTROL_CHARACTERS], ..*self }
    }
}

fn ioctl_bytes(fd: BorrowedFd<'_>, request: u64, bytes: &mut [u8; ROOM], call: &'static str) -> SysResult<()> {
    sys::ioctl_with(fd, request, bytes).map(drop).map_err(|e| SysError::new(call, fd.as_raw_fd(), e))
}

/// The settings of a terminal; of the slave, where this is the master of a pair. TCGETS2.
pub fn settings(fd: impl AsFd) -> SysResult<Settings> {
    let mut bytes = [0; ROOM];
    ioctl_bytes(fd.as_fd(), TCGETS2, &mut bytes, "ioctl TCGETS2")?;
    Ok(Settings::from_bytes(&bytes))
}

/// Sets them, at once. TCSETS2, or TCSETS where the speeds are unknown.
pub fn set_settings(fd: impl AsFd, settings: &Settings) -> SysResult<()> {
    let request = if settings.speeds == [0, 0] { TCSETS } else { TCSETS2 };
    ioctl_bytes(fd.as_fd(), request, &mut settings.bytes(), "ioctl TCSETS")
}

/// Which settings are locked. TIOCGLCKTRMIOS.
pub fn locked_settings(fd: impl AsFd) -> SysResult<Settings> {
    let mut bytes = [0; ROOM];
    ioctl_bytes(fd.as_fd(), TIOCGLCKTRMIOS, &mut bytes, "ioctl TIOCGLCKTRMIOS")?;
    Ok(Settings { speeds: [0, 0], ..Settings::from_bytes(&bytes) })
}

/// Locks settings (needs CAP_SYS_ADMIN). TIOCSLCKTRMIOS.
pub fn lock_settings(fd: impl AsFd, settings: &Settings) -> SysResult<()> {
    ioctl_bytes(fd.as_fd(), TIOCSLCKTRMIOS, &mut settings.bytes(), "ioctl TIOCSLCKTRMIOS")
}

/// The device number of the terminal itself, as `st_rdev`, whatever name it was opened by. TIOCGDEV.
pub fn device(fd: impl AsFd) -> SysResult<u64> {
    let mut number = 0u32;
    let fd = fd.as_fd();
    sys::ioctl_with(fd, TIOCGDEV, &mut number).map_err(|e| SysError::new("ioctl TIOCGDEV", fd.as_raw_fd(), e))?;
    Ok(decode_device(number))
}

/// A device number as the kernel encodes it in 32 bits (include/linux/kdev_t.h, `new_decode_dev`).
pub fn decode_device(number: u32) -> u64 {
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00);
    nix::sys::stat::makedev(major.into(), minor.into())
}

/// Puts one byte in front of whoever reads from this end, as if it had come from the other. TIOCSTI, which is done
/// when it returns, unlike a write to the other end.
pub fn push(fd: impl AsFd, byte: u8) -> SysResult<()> {
    let mut byte = byte;
    let fd = fd.as_fd();
    sys::ioctl_with(fd, TIOCSTI, &mut byte).map(drop).map_err(|e| SysError::new("ioctl TIOCSTI", fd.as_raw_fd(), e))
}

/// Nobody else may open the terminal. TIOCEXCL.
pub fn set_exclusive(fd: impl AsFd) -> SysResult<()> {
    let fd = fd.as_fd();
    sys::ioctl_with(fd, TIOCEXCL, &mut 0u64).map(drop).map_err(|e| SysError::new("ioctl TIOCEXCL", fd.as_raw_fd(), e))
}

/// Makes a group of the caller's session the terminal's foreground. TIOCSPGRP.
pub fn set_foreground(fd: impl AsFd, group: i32) -> SysResult<()> {
    let mut group = group;
    let fd = fd.as_fd();
    sys::ioctl_with(fd, libc::TIOCSPGRP, &mut group)
        .map(drop)
        .map_err(|e| SysError::new("ioctl TIOCSPGRP", fd.as_raw_fd(), e))
}

/// Makes the terminal the controlling one of the caller, which leads a session. TIOCSCTTY.
pub fn take_control(fd: impl AsFd) -> SysResult<()> {
    let fd = fd.as_fd();
    control(fd, libc::TIOCSCTTY).map_err(|e| SysError::new("ioctl TIOCSCTTY", fd.as_raw_fd(), e))
}

/// Gives up the controlling terminal. TIOCNOTTY.
pub fn give_up_control(fd: impl AsFd) -> SysResult<()> {
    let fd = fd.as_fd();
    control(fd, libc::TIOCNOTTY).map_err(|e| SysError::new("ioctl TIOCNOTTY", fd.as_raw_fd(), e))
}

fn control(fd: BorrowedFd<'_>, request: u64) -> Result<(), Errno> {
    // SAFETY: the argument of these two is a number.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, 0) }).map(drop)
}

/// A window's size in characters and pixels.
pub fn size(rows: u32, columns: u32, x_pixels: u32, y_pixels: u32) -> libc::winsize {
    let [ws_row, ws_col, ws_xpixel, ws_ypixel] = [rows, columns, x_pixels, y_pixels].map(|n| n as u16);
    libc::winsize { ws_row, ws_col, ws_xpixel, ws_ypixel }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_decoded() {
        assert_eq!(decode_device(0x8803), nix::sys::stat::makedev(136, 3));
        assert_eq!(decode_device(0x0010_8812), nix::sys::stat::makedev(136, 0x112));
    }

    #[test]
    fn settings_survive_their_bytes() {
        let mut settings = Settings { modes: [1, 2, 3, 4], line: 5, speeds: [38400, 9600], ..Settings::default() };
        settings.characters[18] = 7;
        assert_eq!(Settings::from_bytes(&settings.bytes()), settings);
    }
}
