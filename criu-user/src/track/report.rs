//! What a session reports, once an interval. As JSON it is what `track --json` prints; docs/tracking.md has its schema.

use serde::{Deserialize, Serialize};

/// The state of a session.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The root of the tree.
    pub pid: i32,
    /// The session's own process.
    pub session: i32,
    /// Looks so far.
    pub looks: u64,
    /// Length of the last interval in milliseconds.
    pub interval_ms: u64,
    /// How long the last look took, in microseconds.
    pub look_us: u64,
    /// Bytes written a second, over the last interval. A page counts once, however often it was written.
    pub written_bytes_per_second: u64,
    /// Bytes written since the last image, which the next one would have to take.
    pub pending_bytes: u64,
    /// Bytes written in the last interval as well as in the one before.
    pub working_set_bytes: u64,
    /// Private memory of the tree, in bytes.
    pub memory_bytes: u64,
    /// Whether there is an image that the next can build on.
    pub has_image: bool,
    /// How long a dump now would hold the tree, in microseconds.
    pub predicted_freeze_us: u64,
    /// The processes, by pid.
    pub processes: Vec<ProcessReport>,
}

/// One process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessReport {
    /// Its id.
    pub pid: i32,
    /// Its name.
    pub comm: String,
    /// Bytes written a second, over the last interval.
    pub written_bytes_per_second: u64,
    /// Bytes written since the last image.
    pub pending_bytes: u64,
    /// Bytes written in the last interval as well as in the one before.
    pub working_set_bytes: u64,
    /// Private memory in bytes.
    pub memory_bytes: u64,
    /// Why its memory is not tracked, if it is not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub untracked: Option<String>,
}
