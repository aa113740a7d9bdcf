//! Huge pages of hugetlbfs.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use e2e::{Row, Workload, rows};

/// How many huge pages the kernel may make on demand, beyond those that it keeps.
const ALLOWED: &str = "/proc/sys/vm/nr_overcommit_hugepages";
/// As many as all tests together need.
const ENOUGH: u64 = 256;

/// What was allowed before the first of the tests that run just now, and how many they are.
static USERS: Mutex<(u64, u64)> = Mutex::new((0, 0));

/// Huge pages can be made as long as it lives.
struct Allowed;

impl Allowed {
    fn new() -> Self {
        let mut users = Self::users();
        if users.1 == 0 {
            let before = fs::read_to_string(ALLOWED).expect("what is allowed");
            users.0 = before.trim().parse().expect("a number");
            fs::write(ALLOWED, users.0.max(ENOUGH).to_string()).expect("allowing huge pages");
        }
        users.1 += 1;
        Self
    }

    fn users() -> MutexGuard<'static, (u64, u64)> {
        USERS.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        let mut users = Self::users();
        users.1 -= 1;
        if users.1 == 0 {
            let _ = fs::write(ALLOWED, users.0.to_string());
        }
    }
}

fn check(row: &Row, case: &str) {
    let _allowed = Allowed::new();
    row.check(&Workload::new("hugetlb.c", case));
}

rows! {
    private_pages => |row| check(row, "private_pages");
    copy_on_write => |row| check(row, "copy_on_write");
    shared_pages => |row| check(row, "shared_pages");
    segment => |row| check(row, "segment");
    memory_file => |row| check(row, "memory_file");
    file_of_a_mount => |row| check(row, "file_of_a_mount");

    /// What was written in between is found, page by huge page.
    tracked => |row| {
        let _allowed = Allowed::new();
        crate::track::exact(row, "hugetlb");
    };

    /// A copy could cost the program its pages, so there is none.
    live => |row| {
        let _allowed = Allowed::new();
        let program = Workload::new("hugetlb.c", "private_pages").start();
        crate::live::falls_back(row, program, "huge pages of hugetlbfs", None);
    };
}

/// The formats agree: private memory, memory in common, memory files.
mod interop {
    use super::*;
    use e2e::{Engine, Survey};

    const CASES: [&str; 3] = ["private_pages", "shared_pages", "memory_file"];

    #[test]
    fn ours_to_criu() {
        CASES.iter().for_each(|case| check(&Row::between(Engine::Ours(Survey::Ebpf), Engine::Peer), case));
    }

    #[test]
    fn criu_to_ours() {
        CASES.iter().for_each(|case| check(&Row::between(Engine::Peer, Engine::Ours(Survey::Ebpf)), case));
    }
}
