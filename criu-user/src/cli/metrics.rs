//! Options about metrics, and whom a command tells what it came to.

use std::path::PathBuf;

use clap::Args;
use nix::unistd::Pid;

use crate::metrics::Run;
use crate::metrics::address::Address;
use crate::metrics::textfile::{CommandFile, TextfileError};
use crate::track::TrackError;
use crate::track::client::Client;
use crate::track::export::MetricsOptions;

/// What a dump, pre-dump or restore is asked about metrics.
#[derive(Debug, Args)]
pub(super) struct CommandMetrics {
    /// Add what this comes to (times, pages, failures) to the metrics in a file, which node_exporter's textfile collector
    /// reads if it ends in .prom
    #[arg(long, value_name = "FILE")]
    metrics_file: Option<PathBuf>,
}

/// Whom a command tells what it came to.
#[derive(Debug)]
pub(super) struct Told {
    file: Option<CommandFile>,
}

impl CommandMetrics {
    /// Sees that the file can be written, before anything is done.
    pub fn begin(&self) -> Result<Told, TextfileError> {
        Ok(Told { file: self.metrics_file.clone().map(CommandFile::new).transpose()? })
    }
}

impl Told {
    /// Tells the file, and the session that tracks the tree if there is one. What was done is done: that it cannot be
    /// told is only a warning.
    pub fn run(&self, root: Option<Pid>, run: &Run) {
        if let Some(file) = &self.file
            && let Err(err) = file.add(run)
        {
            tracing::warn!(%err, "this is not in the metrics");
        }
        // A session ends with its tree.
        if let Some(Err(err)) = root.map(|root| tell_session(root, run)) {
            tracing::debug!(%err, "the session is not told");
        }
    }
}

fn tell_session(root: Pid, run: &Run) -> Result<(), TrackError> {
    Client::connect(root)?.map_or(Ok(()), |mut session| session.tell(run))
}

/// What `track` is asked about metrics.
#[derive(Debug, Args)]
pub(super) struct TrackMetrics {
    /// Serve metrics for Prometheus at http://ADDRESS/metrics; a port alone is that of the loopback interface
    #[arg(long, value_name = "[ADDRESS:]PORT")]
    metrics: Option<Address>,
    /// Write the metrics to a file each interval, for node_exporter's textfile collector, which reads it if it ends in .prom
    #[arg(long, value_name = "FILE")]
    metrics_file: Option<PathBuf>,
}

impl TrackMetrics {
    /// For a session of our own.
    pub fn options(&self) -> std::io::Result<MetricsOptions> {
        let file = self.metrics_file.as_ref().map(std::path::absolute).transpose()?;
        Ok(MetricsOptions { address: self.metrics, file })
    }

    /// Whether any are asked for.
    pub fn are_wanted(&self) -> bool {
        self.metrics.is_some() || self.metrics_file.is_some()
    }

    /// As words for a session that is started elsewhere.
    pub fn words(&self) -> std::io::Result<Vec<std::ffi::OsString>> {
        let MetricsOptions { address, file } = self.options()?;
        let address = address.map(|address| ["--metrics".into(), address.to_string().into()]);
        let file = file.map(|file| ["--metrics-file".into(), file.into_os_string()]);
        Ok(address.into_iter().chain(file).flatten().collect())
    }

    /// Fails where something is asked that a session which runs already cannot be told.
    pub fn refuse_for(&self, root: Pid) -> Result<(), TrackError> {
        let option = match (&self.metrics, &self.metrics_file) {
            (Some(_), _) => "--metrics",
            (_, Some(_)) => "--metrics-file",
            _ => return Ok(()),
        };
        Err(TrackError::AlreadyTracked { pid: root.as_raw(), option })
    }
}
