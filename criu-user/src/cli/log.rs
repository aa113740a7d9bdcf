//! Logs in the shape that CRIU's readers know: `(00.001234)   1234: Error (where): message`.

use std::fmt::{self, Write};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::common::Common;
use super::error::CliError;

/// Target of the error that ends a command: the command prints it as well.
pub(super) const OUTCOME: &str = "criu_ebpf";

/// Libraries that tell at length what they do.
const TALKATIVE: [&str; 2] = ["aya", "aya_obj"];

struct Lines {
    begin: Instant,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = Line::default();
        event.record(&mut line);
        let elapsed = self.begin.elapsed();
        write!(writer, "({:02}.{:06}) ", elapsed.as_secs(), elapsed.subsec_micros())?;
        if let Some(pid) = line.pid {
            write!(writer, "{pid:>6}: ")?;
        }
        match *event.metadata().level() {
            Level::ERROR => write!(writer, "Error ({}): ", event.metadata().target())?,
            Level::WARN => write!(writer, "Warn  ({}): ", event.metadata().target())?,
            _ => {}
        }
        writeln!(writer, "{}{}", line.message, line.fields)
    }
}

/// An event taken apart: whom it concerns stands in front, everything else that it carries behind.
#[derive(Default)]
struct Line {
    pid: Option<i64>,
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "pid" {
            self.pid = Some(value);
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            // What the bridge from the crate `log` adds.
            name if name.starts_with("log.") => Ok(()),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Starts logging as the options say: to the file that they name, or to standard error.
pub(super) fn start(common: &Common) -> Result<(), CliError> {
    // Statistics go there as well, when it is too late for an error.
    if let Some(path) = common.work_dir.clone().filter(|path| !path.is_dir()) {
        return Err(CliError::WorkDir { path });
    }
    let level = match common.verbosity() {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let mut targets = Targets::new().with_default(level);
    for library in TALKATIVE {
        targets = targets.with_target(library, level.min(LevelFilter::WARN));
    }
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).event_format(Lines { begin: Instant::now() });
    match &common.log_file {
        Some(name) => {
            let path = common.work_dir().join(name);
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let file = options.open(&path).map_err(|source| CliError::Log { path, source })?;
            tracing_subscriber::registry().with(targets).with(lines.with_writer(Mutex::new(file))).init();
        }
        None => {
            let targets = targets.with_target(OUTCOME, LevelFilter::OFF);
            tracing_subscriber::registry().with(targets).with(lines.with_writer(std::io::stderr)).init();
        }
    }
    Ok(())
}
