//! What earlier looks at this kernel found out, for whoever has to choose and cannot afford to try.
//!
//! `criu-ebpf check` tries everything and keeps what it found; a dump keeps what it learnt on the way. Both hold for
//! this boot, this build of the engine, and the privileges that the engine was started with.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};

use super::kept;
use super::probe::Answer;
use super::proc::read_text;

/// The name of the probe for the survey by eBPF iterators.
pub const ITERATORS: &str = "iterators";

/// Answers by the name of the probe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Known(BTreeMap<String, Said>);

/// What a probe said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    present: bool,
    why: String,
}

impl Known {
    /// What is kept. Nothing, if it is damaged or may be somebody else's.
    pub fn recall() -> Self {
        let text = name().and_then(|name| kept::read(&name));
        text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// Why something is known to be absent.
    pub fn absent(&self, probe: &str) -> Option<&str> {
        self.0.get(probe).filter(|said| !said.present).map(|said| said.why.as_str())
    }

    /// Adds an answer.
    pub fn learn(&mut self, probe: &str, answer: &Answer) {
        let (present, why) = match answer {
            Ok(detail) => (true, detail.clone()),
            Err(absent) => (false, absent.to_string()),
        };
        self.0.insert(probe.to_owned(), Said { present, why });
    }

    /// Keeps everything for the next time.
    pub fn keep(&self) -> io::Result<()> {
        let name = name().ok_or_else(|| io::Error::other("this kernel does not tell its boot id"))?;
        kept::write(&name, &serde_json::to_string(self)?)
    }
}

fn name() -> Option<String> {
    let build = kept::build_id().ok()?;
    // A kernel gives different answers to different privileges.
    let status = read_text("/proc/self/status").ok()?;
    let privileges: String =
        status.lines().filter(|l| ["CapEff:", "Seccomp:"].iter().any(|key| l.starts_with(key))).collect();
    let user = std::fs::read_link("/proc/self/ns/user").ok()?;
    kept::name("check", [build.as_slice(), privileges.as_bytes(), user.as_os_str().as_encoded_bytes()])
}

#[cfg(test)]
mod tests {
    use super::super::probe::Absent;
    use super::*;

    #[test]
    fn what_is_learnt_is_known() {
        let mut known = Known::default();
        known.learn("a", &Ok("it works".to_owned()));
        known.learn("b", &Err(Absent::because("it does not")));
        assert_eq!((known.absent("a"), known.absent("b"), known.absent("c")), (None, Some("it does not"), None));
        let text = serde_json::to_string(&known).expect("plain data");
        assert_eq!(serde_json::from_str::<Known>(&text).expect("its own text"), known);
    }
}
