//! What the watching programs cost those who are followed, and everybody else.

use std::time::{Duration, Instant};

use criu_user::kernel::ebpf::watch::{Questions, Watch};
use nix::unistd::Pid;

/// Nanoseconds of processor time that a call takes, in the best of many rounds: others use this machine as well.
fn each(calls: u32, call: &mut dyn FnMut()) -> f64 {
    const ROUNDS: u32 = 60;
    let clock = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the clock");
    let round = |_| {
        let begin = clock();
        (0..calls).for_each(|_| call());
        Duration::from(clock() - begin).as_nanos() as f64 / f64::from(calls)
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}

/// Memory of the test's own, of small pages that can be taken away and written again.
struct Pages {
    at: std::ptr::NonNull<std::ffi::c_void>,
    len: std::num::NonZeroUsize,
}

impl Pages {
    fn new(len: usize) -> Self {
        use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};
        let len = std::num::NonZeroUsize::new(len).expect("some");
        let (prot, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe { mmap_anonymous(None, len, prot, flags) }.expect("map");
        // SAFETY: nobody has it yet.
        unsafe { madvise(at, len.get(), MmapAdvise::MADV_NOHUGEPAGE) }.expect("advise");
        Self { at, len }
    }

    /// Writes every page, each with a fault.
    fn write(&mut self) {
        use nix::sys::mman::{MmapAdvise, madvise};
        // SAFETY: its own memory, which becomes zeros.
        unsafe { madvise(self.at, self.len.get(), MmapAdvise::MADV_DONTNEED) }.expect("advise");
        for offset in (0..self.len.get()).step_by(4096) {
            // SAFETY: inside of it.
            unsafe { self.at.as_ptr().cast::<u8>().add(offset).write_volatile(1) };
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: its own, and nobody else has a pointer into it.
        unsafe { nix::sys::mman::munmap(self.at, self.len.get()) }.expect("unmap");
    }
}

const WHAT: [&str; 5] =
    ["getppid", "dup and close", "read of a page", "write and read of a pair", "first write to a page"];

/// Nanoseconds that each of [`WHAT`] takes.
fn measure() -> [f64; 5] {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::{dup, getppid, read, write};
    const PAGES: usize = 2048;
    let zero = std::fs::File::open("/dev/zero").expect("open");
    let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty()).expect("a pair");
    let mut page = [0u8; 4096];
    let mut pages = Pages::new(PAGES * 4096);
    [
        each(5_000, &mut || _ = getppid()),
        each(2_000, &mut || drop(dup(&zero))),
        each(5_000, &mut || _ = read(&zero, &mut page)),
        each(2_000, &mut || {
            write(&a, b"0123456789").expect("write");
            read(&b, &mut [0; 10]).expect("read");
        }),
        each(2, &mut || pages.write()) / PAGES as f64,
    ]
}

/// What some programs cost: for a process that nobody follows, and for one that is followed. Whether the first is next to
/// nothing.
fn cost(name: &str, questions: Questions) -> bool {
    let before = measure();
    let mut watch = Watch::start(questions).expect("load");
    let others = measure();
    watch.follow(Pid::this()).expect("follow");
    let followed = measure();
    drop(watch);
    let after = measure();
    let mut is_cheap = true;
    for (at, what) in WHAT.iter().enumerate() {
        let bare = before[at].min(after[at]);
        let (others, followed) = (others[at] - bare, followed[at] - bare);
        println!("{name:<10} {what:<25} {bare:7.1} ns; others {others:+6.1} ns; followed {followed:+6.1} ns");
        // What sleeps or allocates cannot be measured well enough on a busy machine.
        is_cheap &= at > 2 || others < bare * 0.25 + 30.0;
    }
    is_cheap
}

/// What the programs cost, printed. Others are not to notice that somebody is watched, but for what the kernel itself does
/// when somebody looks at system calls.
#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn what_it_costs() {
    let mut watch = Watch::start(Questions::LIFECYCLE).expect("load");
    for _ in 0..3 {
        let begin = Instant::now();
        watch.ask(Questions::LIFECYCLE | Questions::SYSCALLS).expect("look");
        let looking = begin.elapsed();
        watch.ask(Questions::LIFECYCLE).expect("look away");
        println!("looking at system calls begins in {looking:?}, ends in {:?}", begin.elapsed() - looking);
    }
    drop(watch);
    let begin = Instant::now();
    let watch = Watch::start(Questions::all()).expect("load");
    println!("all questions are loaded in {:?}", begin.elapsed());
    let begin = Instant::now();
    drop(watch);
    println!("and gone in {:?}", begin.elapsed());
    cost("syscalls", Questions::LIFECYCLE | Questions::SYSCALLS);
    cost("all", Questions::all());
    for (name, questions) in [
        ("lifecycle", Questions::LIFECYCLE),
        ("memory", Questions::LIFECYCLE | Questions::MEMORY),
        ("sockets", Questions::LIFECYCLE | Questions::SOCKETS),
        ("cgroups", Questions::LIFECYCLE | Questions::CGROUPS),
    ] {
        // Somebody else on this machine may look at system calls at the same time.
        assert!((0..3).any(|_| cost(name, questions)), "{name}: others notice it");
    }
}
