//! Things of which the system has one for all, and which a dump frees: what has a number must find it free at the
//! restore. Programs that have them run one at a time, those of another run of the tests included.

use std::{
    cell::RefCell,
    fs::File,
    sync::{Arc, Weak},
};

use nix::fcntl::{Flock, FlockArg};

/// What a program lays claim to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Claim {
    /// Pseudo-terminals: the lowest free number is the next.
    Terminals,
    /// Ports: the kernel gives a freed one to whoever connects next.
    Ports,
}

/// A claim that holds until it is dropped.
pub type Claimed = Arc<Flock<File>>;

thread_local! {
    /// What the programs of this test have: a peer lays the same claim.
    static OWN: RefCell<[Weak<Flock<File>>; 2]> = const { RefCell::new([Weak::new(), Weak::new()]) };
}

impl Claim {
    /// Waits until no program of another test has such things.
    pub fn take(self) -> Claimed {
        OWN.with_borrow_mut(|own| {
            let place = &mut own[self as usize];
            place.upgrade().unwrap_or_else(|| {
                let claimed = Arc::new(self.lock());
                *place = Arc::downgrade(&claimed);
                claimed
            })
        })
    }

    fn lock(self) -> Flock<File> {
        let name = std::env::temp_dir().join(format!("criu-ebpf-e2e-{self:?}.lock"));
        let file = File::create(&name).unwrap_or_else(|error| panic!("creating {}: {error}", name.display()));
        Flock::lock(file, FlockArg::LockExclusive)
            .unwrap_or_else(|(_, error)| panic!("locking {}: {error}", name.display()))
    }
}
