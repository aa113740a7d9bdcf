//! What this machine can, and what that means for dumps and restores.
//!
//! Whether something is there is found out by trying it ([`crate::kernel::probe`]), never by the kernel's version. Here
//! stands what each thing is good for, what serves in its place, and what to do: [`table`] lists all of it, [`features`]
//! the questions that CRIU's users know.

pub mod features;
pub mod table;

use serde::Serialize;

use crate::kernel::known::Known;
use crate::kernel::probe::Answer;

/// Something that the engine makes use of.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// Its stable name.
    pub name: &'static str,
    /// What it belongs to, for readers.
    pub group: &'static str,
    /// What the engine does with it.
    pub purpose: &'static str,
    /// What follows where it is absent.
    pub without: Without,
    /// How to get it.
    pub advice: &'static str,
    /// Tries it.
    pub ask: fn() -> Answer,
}

/// What follows where something is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    /// A plain dump or restore does not work.
    Nothing,
    /// Something else serves, or a kind of program is refused: this.
    Less(&'static str),
    /// Nothing that works today is lost: this serves as well.
    Same(&'static str),
}

/// How strictly a check judges: which rows have to be present for it to succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Demand {
    /// Also those without which some programs are refused, or are dumped more slowly.
    pub extra: bool,
    /// Also those for which something else serves as well.
    pub experimental: bool,
}

/// How something stands here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is there.
    Present,
    /// It is not; something else serves.
    Fallback,
    /// It is not, and a plain dump or restore needs it.
    Missing,
}

/// A line of a report. Its fields are what `check --json` prints; their names stay.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The probe's name.
    pub name: &'static str,
    /// What it belongs to.
    pub group: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was found, or why it is absent.
    pub detail: String,
    /// What it is good for.
    pub purpose: &'static str,
    /// What serves in its place; `null` where nothing does.
    pub fallback: Option<&'static str>,
    /// How to get it.
    pub advice: &'static str,
    #[serde(skip)]
    without: Without,
}

/// Everything that was found out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether a plain dump and restore can work.
    pub ok: bool,
    /// A row for each probe, in the order of the table.
    pub rows: Vec<Row>,
}

/// Tries everything, and keeps what was found for the dumps to come.
pub fn run() -> Report {
    let mut known = Known::default();
    let rows: Vec<Row> = table::PROBES
        .iter()
        .map(|probe| {
            let answer = (probe.ask)();
            known.learn(probe.name, &answer);
            probe.row(answer)
        })
        .collect();
    if let Err(error) = known.keep() {
        tracing::debug!(%error, "what was found out is not kept");
    }
    Report { ok: rows.iter().all(|row| row.status != Status::Missing), rows }
}

impl Probe {
    fn row(&self, answer: Answer) -> Row {
        let (status, detail) = match (answer, self.without) {
            (Ok(detail), _) => (Status::Present, detail),
            (Err(absent), Without::Nothing) => (Status::Missing, absent.why),
            (Err(absent), _) => (Status::Fallback, absent.why),
        };
        let fallback = match self.without {
            Without::Nothing => None,
            Without::Less(what) | Without::Same(what) => Some(what),
        };
        let Self { name, group, purpose, advice, without, .. } = *self;
        Row { name, group, status, detail, purpose, fallback, advice, without }
    }
}

impl Report {
    /// The rows that are not as they have to be.
    pub fn failing(&self, demand: Demand) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |row| match (row.status, row.without) {
            (Status::Present, _) => false,
            (_, Without::Nothing) => true,
            (_, Without::Less(_)) => demand.extra,
            (_, Without::Same(_)) => demand.experimental,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::probe::Absent;

    fn probe(without: Without) -> Probe {
        let ask = || Ok(String::new());
        Probe { name: "thing", group: "things", purpose: "to try", without, advice: "get one", ask }
    }

    #[test]
    fn what_is_absent_counts_as_strictly_as_is_asked() {
        let absent = || Err(Absent::because("not here"));
        let all = [Without::Nothing, Without::Less("less"), Without::Same("same")];
        let rows: Vec<Row> = all.iter().map(|without| probe(*without).row(absent())).collect();
        assert_eq!(rows[0].status, Status::Missing);
        assert_eq!((rows[1].status, rows[1].fallback), (Status::Fallback, Some("less")));
        let report = Report { ok: false, rows };
        let failing = |extra, experimental| report.failing(Demand { extra, experimental }).count();
        assert_eq!(
            [failing(false, false), failing(true, false), failing(false, true), failing(true, true)],
            [1, 2, 2, 3]
        );
    }

    #[test]
    fn names_are_unique_and_say_everything() {
        let mut seen = std::collections::BTreeSet::new();
        for probe in table::PROBES {
            assert!(seen.insert(probe.name), "{} is there twice", probe.name);
            assert!(!probe.purpose.is_empty() && !probe.advice.is_empty(), "{} says too little", probe.name);
        }
        assert!(seen.contains(crate::kernel::known::ITERATORS));
    }
}
