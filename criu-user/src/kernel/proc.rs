//! /proc, the parts that are read while the target stands still.
//!
//! The `procfs` crate parses whole files into owned maps; in the freeze, over thousands of threads and areas, that
//! costs more than everything else together. So the few fields that a dump needs are picked out here, in one pass
//! over a reused buffer. proc(5) describes the files.

use std::fs;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::error::During;
use super::{SysError, SysResult};

/// Reads a whole file of /proc as text (bytes that are no UTF-8 are replaced).
pub fn read_text(path: &str) -> SysResult<String> {
    let bytes = read_all(path).during("read", path)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

/// Files of /proc tell nobody how long they are, and most are short: nobody is asked, and the first look sees all.
fn read_all(path: &str) -> std::io::Result<Vec<u8>> {
    const ROOM: usize = 4 << 10;
    let mut file = fs::File::open(path)?;
    let mut bytes = vec![0; ROOM];
    let mut len = 0;
    loop {
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
        if bytes.len() - len < ROOM / 2 {
            bytes.resize(bytes.len() * 2, 0);
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

fn malformed(path: &str) -> SysError {
    SysError::new("parse", path, Errno::EBADMSG)
}

fn numbered_entries(path: &str) -> SysResult<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(path).during("read directory", path)? {
        let entry = entry.during("read directory", path)?;
        if let Some(n) = entry.file_name().to_str().and_then(|s| s.parse().ok()) {
            numbers.push(n);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Threads of a process, ascending (the leader's id is the lowest only by chance).
pub fn threads(pid: Pid) -> SysResult<Vec<Pid>> {
    Ok(numbered_entries(&format!("/proc/{pid}/task"))?.into_iter().map(Pid::from_raw).collect())
}

/// Numbers of the open descriptors of a process, ascending.
pub fn descriptors(pid: Pid) -> SysResult<Vec<i32>> {
    numbered_entries(&format!("/proc/{pid}/fd"))
}

/// How many descriptors a process has, which its directory tells as its size since Linux 6.2; 0 before.
pub fn count_descriptors(pid: Pid) -> usize {
    fs::metadata(format!("/proc/{pid}/fd")).map_or(0, |meta| meta.len() as usize)
}

/// Children that one thread has started (children belong to threads until these exit). Needs CONFIG_PROC_CHILDREN.
pub fn children(pid: Pid, tid: Pid) -> SysResult<Vec<Pid>> {
    let path = format!("/proc/{pid}/task/{tid}/children");
    let text = read_text(&path)?;
    text.split_ascii_whitespace().map(|word| word.parse().map(Pid::from_raw).map_err(|_| malformed(&path))).collect()
}

/// The fields of `/proc/PID/stat` that a dump needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Thread name.
    pub comm: String,
    /// One letter: R, S, D, Z, T, t, X, …
    pub state: char,
    /// Parent process.
    pub ppid: Pid,
    /// Process group.
    pub pgid: Pid,
    /// Session.
    pub sid: Pid,
    /// Controlling terminal's device number, 0 if none.
    pub tty: i32,
    /// Foreground group of that terminal, -1 if none.
    pub foreground: i32,
    /// Task flags, `PF_*`.
    pub flags: u32,
    /// Nice value.
    pub nice: i32,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
    /// Code area.
    pub start_code: u64,
    /// End of the code area.
    pub end_code: u64,
    /// Bottom of the stack at exec.
    pub start_stack: u64,
    /// Data area.
    pub start_data: u64,
    /// End of the data area.
    pub end_data: u64,
    /// Start of the heap.
    pub start_brk: u64,
    /// Argument strings.
    pub arg_start: u64,
    /// End of the argument strings.
    pub arg_end: u64,
    /// Environment strings.
    pub env_start: u64,
    /// End of the environment strings.
    pub env_end: u64,
    /// Status that wait(2) will report.
    pub exit_code: i32,
    /// Signal sent to the parent on exit.
    pub exit_signal: i32,
}

/// A process, and the name under which /proc shows what it has.
///
/// Memory, descriptors and directories of a process whose first thread has ended are gone from /proc/PID, but each of its
/// threads has a directory like that of a process (`proc_pid_lookup` of fs/proc/base.c takes any task's id).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    /// The process.
    pub pid: Pid,
    /// Its first thread that lives.
    pub by: Pid,
}

impl Shown {
    /// Finds a process; `None` if it has ended.
    pub fn find(pid: Pid) -> Option<Self> {
        let alive = |tid: &Pid| stat(pid, Some(*tid)).is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X'));
        if alive(&pid) {
            return Some(Self { pid, by: pid });
        }
        threads(pid).ok()?.into_iter().find(alive).map(|by| Self { pid, by })
    }
}

/// Waits until this thread is the only one of its process. Whoever joins a thread may go on a moment before the kernel
/// has counted it out.
pub fn wait_until_alone() -> SysResult<()> {
    const PATIENCE: Duration = Duration::from_secs(1);
    const TASKS: &str = "/proc/self/task";
    let begin = Instant::now();
    while fs::read_dir(TASKS).during("read directory", TASKS)?.count() > 1 {
        if begin.elapsed() > PATIENCE {
            return Err(SysError::new("wait for threads of the engine's own", TASKS, Errno::ETIMEDOUT));
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// Bytes of the huge pages that one gets who asks for no size: /proc/meminfo.
pub fn huge_page_size() -> u64 {
    const DEFAULT: u64 = 2 << 20;
    let text = read_text("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok()).map_or(DEFAULT, |kib| kib * 1024)
}

/// Pages of a process that are in memory, files' included; 0 if it has ended.
pub fn resident_pages(pid: Pid) -> u64 {
    let text = read_text(&format!("/proc/{pid}/statm")).unwrap_or_default();
    text.split_ascii_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// The processes of a tree, parents before children. One that forks meanwhile may be seen without its newest child.
pub fn tree(root: Pid) -> Vec<Pid> {
    let mut order = vec![root];
    let mut at = 0;
    while at < order.len() {
        let pid = order[at];
        let threads = threads(pid).unwrap_or_default();
        order.extend(threads.iter().flat_map(|&tid| children(pid, tid).unwrap_or_default()));
        at += 1;
    }
    order
}

/// `/proc/PID/stat`, or a thread's with `task`.
pub fn stat(pid: Pid, task: Option<Pid>) -> SysResult<Stat> {
    let path = match task {
        Some(tid) => format!("/proc/{pid}/task/{tid}/stat"),
        None => format!("/proc/{pid}/stat"),
    };
    parse_stat(&read_text(&path)?).ok_or_else(|| malformed(&path))
}

/// The name of a thread, whatever bytes it has: `/proc/PID/task/TID/comm` without the line's end.
pub fn comm(pid: Pid, tid: Pid) -> SysResult<Vec<u8>> {
    let path = format!("/proc/{pid}/task/{tid}/comm");
    let mut name = fs::read(&path).during("read", &path)?;
    name.pop();
    Ok(name)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name may hold spaces and parentheses: it ends at the last one.
    let (open, close) = (text.find('(')?, text.rfind(')')?);
    let comm = text.get(open + 1..close)?.to_owned();
    let fields: Vec<&str> = text.get(close + 1..)?.split_ascii_whitespace().collect();
    // proc_pid_stat(5) counts from 1 and the state is field 3.
    let field = |n: usize| fields.get(n - 3).copied();
    let number = |n: usize| field(n).and_then(|s| s.parse::<i64>().ok());
    let unsigned = |n: usize| field(n).and_then(|s| s.parse::<u64>().ok());
    Some(Stat {
        comm,
        state: field(3)?.chars().next()?,
        ppid: Pid::from_raw(number(4)? as i32),
        pgid: Pid::from_raw(number(5)? as i32),
        sid: Pid::from_raw(number(6)? as i32),
        tty: number(7)? as i32,
        foreground: number(8)? as i32,
        flags: number(9)? as u32,
        nice: number(19)? as i32,
        start_time: unsigned(22)?,
        start_code: unsigned(26)?,
        end_code: unsigned(27)?,
        start_stack: unsigned(28)?,
        start_data: unsigned(45)?,
        end_data: unsigned(46)?,
        start_brk: unsigned(47)?,
        arg_start: unsigned(48)?,
        arg_end: unsigned(49)?,
        env_start: unsigned(50)?,
        env_end: unsigned(51)?,
        exit_code: number(52)? as i32,
        exit_signal: number(38)? as i32,
    })
}

/// `Key: value` lines, as in `/proc/PID/status` and fdinfo.
#[derive(Debug, Clone)]
pub struct KeyValues {
    text: String,
    path: String,
}

impl KeyValues {
    /// Reads such a file.
    pub fn read(path: String) -> SysResult<Self> {
        Ok(Self { text: read_text(&path)?, path })
    }

    /// `/proc/PID/task/TID/status`.
    pub fn status(pid: Pid, tid: Pid) -> SysResult<Self> {
        Self::read(format!("/proc/{pid}/task/{tid}/status"))
    }

    /// `/proc/PID/fdinfo/FD`.
    pub fn fdinfo(pid: Pid, fd: i32) -> SysResult<Self> {
        Self::read(format!("/proc/{pid}/fdinfo/{fd}"))
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The value of `key`, trimmed.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
    }

    /// Every value of a repeated key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.text.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
    }

    /// The value of `key` as words, or an error that names the file.
    pub fn words(&self, key: &str) -> SysResult<Vec<&str>> {
        Ok(self.get(key).ok_or_else(|| malformed(&self.path))?.split_ascii_whitespace().collect())
    }

    /// The value of `key` in base `radix`.
    pub fn number(&self, key: &str, radix: u32) -> SysResult<u64> {
        self.get(key).and_then(|v| u64::from_str_radix(v, radix).ok()).ok_or_else(|| malformed(&self.path))
    }
}

/// A directory of links, such as `/proc/PID/ns`, to read several of them.
#[derive(Debug)]
pub struct LinkDir {
    dir: OwnedFd,
    path: String,
}

impl LinkDir {
    /// Opens it.
    pub fn open(path: String) -> SysResult<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(path.as_str(), flags, Mode::empty()).during("open", &path)?;
        Ok(Self { dir, path })
    }

    /// Where a link of it leads.
    pub fn link(&self, name: &str) -> SysResult<PathBuf> {
        let target = nix::fcntl::readlinkat(&self.dir, name)
            .map_err(|e| SysError::new("readlink", format!("{}/{name}", self.path), e))?;
        Ok(target.into())
    }
}

/// The target of a link in /proc, such as `cwd`, `root`, `exe` or `fd/3`.
pub fn link(path: &str) -> SysResult<PathBuf> {
    fs::read_link(path).during("readlink", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_stat_is_understood() {
        let stat = stat(Pid::this(), None).expect("own stat");
        assert_eq!(stat.ppid, Pid::parent());
        assert!(stat.start_code < stat.end_code);
    }

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let mut line = String::from("7 (a) b (c)) S 3 4 5 6");
        for n in 8..=52 {
            line.push_str(&format!(" {n}"));
        }
        let stat = parse_stat(&line).expect("stat");
        assert_eq!((stat.comm.as_str(), stat.ppid.as_raw(), stat.start_brk), ("a) b (c)", 3, 47));
    }
}
