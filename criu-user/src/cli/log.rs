//! Logs in the shape that CRIU's readers know: `(00.001234) Error message`.

use std::fmt;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;
use std::time::Instant;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::Common;

struct Lines {
    begin: Instant,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let elapsed = self.begin.elapsed();
        write!(writer, "({:02}.{:06}) ", elapsed.as_secs(), elapsed.subsec_micros())?;
        match *event.metadata().level() {
            Level::ERROR => write!(writer, "Error ({}): ", event.metadata().target())?,
            Level::WARN => write!(writer, "Warn  ({}): ", event.metadata().target())?,
            _ => {}
        }
        ctx.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Starts logging as the options say. Without a file, only warnings and errors of the engine go to standard error, and
/// the error that ends the command is printed by the command.
pub fn start(common: &Common) -> std::io::Result<()> {
    let level = match common.verbosity {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let builder =
        tracing_subscriber::fmt().with_ansi(false).with_max_level(level).event_format(Lines { begin: Instant::now() });
    match &common.log_file {
        Some(name) => {
            let path = common.work_dir().join(name);
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .map_err(|e| std::io::Error::new(e.kind(), format!("open of the log {}: {e}", path.display())))?;
            builder.with_writer(Mutex::new(file)).init();
        }
        // The command itself prints the error that ended it.
        None if common.verbosity <= 2 => {
            builder.with_max_level(LevelFilter::OFF).with_writer(std::io::stderr).init();
        }
        None => builder.with_writer(std::io::stderr).init(),
    }
    Ok(())
}
