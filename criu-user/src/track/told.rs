//! What a command tells its session of a run, on the wire.

use std::time::Duration;

use super::wire::Told;
use crate::image::proto::session::{Phase as PhaseOnWire, told::Kind};
use crate::kernel::survey_cache::CacheUse;
use crate::metrics::{Operation, Pages, Phase, Reason, Run};

impl From<&Run> for Told {
    fn from(run: &Run) -> Self {
        let phase = |&(phase, time): &(Phase, Duration)| PhaseOnWire {
            name: phase.name().to_owned(),
            us: time.as_micros() as u64,
        };
        Self {
            operation: match run.operation {
                Operation::Dump => Kind::Dump,
                Operation::PreDump => Kind::PreDump,
                Operation::Restore => Kind::Restore,
            }
            .into(),
            reason: run.failure.map(|reason| reason.name().to_owned()),
            phases: run.phases.iter().map(phase).collect(),
            pages_written: Some(run.pages.written),
            pages_in_parent: Some(run.pages.in_parent),
            pages_skipped: Some(run.pages.skipped),
            cache_hits: Some(run.maps.hits),
            cache_misses: Some(run.maps.misses),
            connection_hits: Some(run.connections.hits),
            connection_misses: Some(run.connections.misses),
            bytes: Some(run.bytes),
        }
    }
}

/// Names that this version does not know make no labels: a reason becomes [`Reason::Other`], a phase is left out.
impl From<Told> for Run {
    fn from(told: Told) -> Self {
        let phase = |phase: &PhaseOnWire| Some((Phase::named(&phase.name)?, Duration::from_micros(phase.us)));
        Self {
            operation: match told.operation() {
                Kind::Dump => Operation::Dump,
                Kind::PreDump => Operation::PreDump,
                Kind::Restore => Operation::Restore,
            },
            failure: told.reason.as_deref().map(|name| Reason::named(name).unwrap_or(Reason::Other)),
            phases: told.phases.iter().filter_map(phase).collect(),
            pages: Pages {
                written: told.pages_written(),
                in_parent: told.pages_in_parent(),
                skipped: told.pages_skipped(),
            },
            maps: CacheUse { hits: told.cache_hits(), misses: told.cache_misses() },
            connections: CacheUse { hits: told.connection_hits(), misses: told.connection_misses() },
            bytes: told.bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrives_is_what_was_told() {
        let good = Run {
            operation: Operation::PreDump,
            failure: None,
            phases: vec![(Phase::Frozen, Duration::from_micros(3)), (Phase::Total, Duration::from_secs(4))],
            pages: Pages { written: 1, in_parent: 2, skipped: 3 },
            maps: CacheUse { hits: 4, misses: 5 },
            connections: CacheUse { hits: 6, misses: 7 },
            bytes: 4096,
        };
        for run in [good, Run::failed(Operation::Dump, Reason::NoSpace), Run::failed(Operation::Restore, Reason::Pid)] {
            assert_eq!(Run::from(Told::from(&run)), run);
        }
    }

    #[test]
    fn unknown_names_make_no_labels() {
        let mut told = Told::from(&Run::failed(Operation::Dump, Reason::Freeze));
        told.reason = Some("weather".into());
        told.phases.push(PhaseOnWire { name: "thinking".into(), us: 1 });
        assert_eq!(Run::from(told), Run::failed(Operation::Dump, Reason::Other));
    }
}
