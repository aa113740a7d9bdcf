//! TCP connections, from one set of sockets to another without the peer noticing more than a pause.
//!
//! A connection is its two addresses, where both ends stand in the stream of bytes and which of them are still under
//! way, what was agreed on at its beginning, and how much of its end has been said. The kernel shows and takes all of
//! that in repair mode (tcp(7)): [`read()`] gives a [`Connection`], [`Course`] tells how one is made of it again, step by
//! step, and [`rebuild::perform`] makes the steps. Nobody may hear of it meanwhile: that is the gate's part, see [`hold`]
//! and [`lock`].
//!
//! [`read()`] and [`Course`] know nothing of dumps. A socket that is open already can be moved by them alone:
//!
//! ```no_run
//! # use criu_user::object::tcp::{self, Course, Ends, State, rebuild};
//! # fn moved(old: std::os::fd::OwnedFd, ends: Ends) -> Result<(), Box<dyn std::error::Error>> {
//! let connection = tcp::read(&old)?;
//! let course = Course::of(connection.state, &connection.stream)?;
//! criu_user::kernel::tcp::set_repair(&old, criu_user::kernel::tcp::Repair::On)?;
//! drop(old);
//! let new = criu_user::kernel::socket::new(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
//! let wire = rebuild::Wire::default();
//! for steps in [&course.make, &course.release, &course.resume] {
//!     rebuild::perform(&new, &ends, &connection.data, steps, &wire)?;
//! }
//! # Ok(())
//! # }
//! ```

pub mod admit;
pub mod capture;
pub mod clients;
pub mod course;
pub mod ends;
mod fallback;
pub mod hold;
pub mod lock;
pub mod options;
pub mod packet;
pub mod read;
pub mod rebuild;
pub mod revive;
pub mod state;
mod streams;
pub mod table;
mod tls;

pub use course::{Course, Segment, Step};
pub use ends::Ends;
pub use hold::Hold;
pub use lock::NetworkLock;
pub use read::{Connection, read};
pub use state::State;
