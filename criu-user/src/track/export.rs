//! Where a session's metrics go: an address that is asked (`--metrics`), a file that is written (`--metrics-file`).

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use nix::unistd::Pid;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::TrackError;
use super::measures::Measures;
use super::report::Report;
use crate::metrics::address::Address;
use crate::metrics::serve::serve;
use crate::metrics::textfile::SessionFile;

/// Where metrics go, if anywhere.
#[derive(Debug, Clone, Default)]
pub struct MetricsOptions {
    /// They are served here.
    pub address: Option<Address>,
    /// They are written to this file each interval. An absolute path: a session in the background is elsewhere.
    pub file: Option<PathBuf>,
}

/// What is needed for that.
#[derive(Debug, Default)]
pub(super) struct Exporter {
    listener: Option<TcpListener>,
    file: Option<SessionFile>,
}

impl Exporter {
    /// Takes address and file. Needs a tokio runtime.
    pub fn begin(options: &MetricsOptions, root: Pid) -> Result<Self, TrackError> {
        let listener = options.address.map(listen).transpose()?;
        let file = options.file.clone().map(|path| SessionFile::new(path, root.as_raw())).transpose()?;
        Ok(Self { listener, file })
    }

    /// Writes the file, if there is to be one.
    pub fn write(&mut self, measures: &Measures, report: &Report) -> Result<(), TrackError> {
        match &mut self.file {
            Some(file) => Ok(file.write(&measures.exposition(report))?),
            None => Ok(()),
        }
    }

    /// Serves, and writes with each report, for as long as it is polled. Needs to run in a [`tokio::task::LocalSet`].
    pub async fn run(mut self, measures: Rc<RefCell<Measures>>, reports: watch::Receiver<Report>) {
        if self.listener.is_none() && self.file.is_none() {
            // What is counted only while somebody looks on is not counted for us.
            drop(reports);
            return std::future::pending().await;
        }
        let listener = self.listener.take();
        let serving = async {
            let Some(listener) = listener else { return std::future::pending().await };
            let (measures, reports) = (measures.clone(), reports.clone());
            serve(listener, move || measures.borrow().exposition(&reports.borrow())).await;
        };
        let mut latest = reports.clone();
        let writing = async {
            while self.file.is_some() && latest.changed().await.is_ok() {
                // It says so itself where it fails.
                let _ = self.write(&measures.borrow(), &latest.borrow_and_update());
            }
            std::future::pending::<()>().await;
        };
        tokio::join!(serving, writing);
    }
}

fn listen(address: Address) -> Result<TcpListener, TrackError> {
    let listener = std::net::TcpListener::bind(address.0).and_then(|listener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    });
    listener.map_err(|source| TrackError::Metrics { address, source })
}
