//! How far the memory of a tree has been written or filled: a bar on a terminal; elsewhere a line now and then, once it
//! takes long.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

use super::common::Common;

/// How often a line is printed where there is no terminal.
const LINE: Duration = Duration::from_secs(5);

/// What the bar looks like.
const TEMPLATE: &str = "{prefix} [{wide_bar}] {bytes}/{total_bytes}, {binary_bytes_per_sec}, {eta} left";

/// How far it is.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    /// Bytes that were announced.
    expected: AtomicU64,
    shown: Shown,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
    Nothing,
}

/// What a line needs to know.
#[derive(Debug)]
struct Lines {
    begin: Instant,
    last: Instant,
    done: u64,
}

impl Progress {
    /// Of a command that does `what` with memory. Whoever has the log on standard error reads it there.
    pub fn new(what: &'static str, common: &Common) -> Self {
        const STORY: u8 = 3;
        let shown = if common.quiet || (common.log_file.is_none() && common.verbosity() >= STORY) {
            Shown::Nothing
        } else if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
            // Builders do not draw; setters would.
            let bar = ProgressBar::new(0).with_style(style).with_prefix(what);
            Shown::Bar(bar)
        } else {
            let now = Instant::now();
            Shown::Lines(Mutex::new(Lines { begin: now, last: now, done: 0 }))
        };
        Self { what, expected: AtomicU64::new(0), shown }
    }

    /// Whether anybody sees it.
    pub fn is_shown(&self) -> bool {
        !matches!(self.shown, Shown::Nothing)
    }

    /// So much more is to be done.
    pub fn expect(&self, bytes: u64) {
        self.expected.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So much more is done.
    pub fn advance(&self, bytes: u64) {
        let expected = self.expected.load(Ordering::Relaxed);
        match &self.shown {
            // Nothing is drawn before something moves.
            _ if bytes == 0 => {}
            Shown::Bar(bar) => {
                bar.update(|state| {
                    let done = state.pos() + bytes;
                    state.set_len(expected.max(done));
                    state.set_pos(done);
                });
            }
            Shown::Lines(lines) => {
                let mut lines = lock(lines);
                lines.done += bytes;
                if lines.last.elapsed() >= LINE {
                    lines.last = Instant::now();
                    eprintln!("{} {}", self.what, lines.text(expected));
                }
            }
            Shown::Nothing => {}
        }
    }

    /// All is done. How much that was had only been estimated.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown
            && bar.position() > 0
        {
            bar.update(|state| state.set_len(state.pos()));
            bar.finish();
            // It leaves the cursor behind the bar.
            eprintln!();
        }
    }

    /// It comes to nothing.
    pub fn give_up(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn lock(lines: &Mutex<Lines>) -> std::sync::MutexGuard<'_, Lines> {
    lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Lines {
    fn text(&self, expected: u64) -> String {
        let elapsed = self.begin.elapsed();
        let rate = (self.done as f64 / elapsed.as_secs_f64()).max(1.0);
        let left = Duration::from_secs_f64(expected.saturating_sub(self.done) as f64 / rate);
        format!(
            "{} of {}, {}/s, {} left",
            HumanBytes(self.done),
            HumanBytes(expected.max(self.done)),
            HumanBytes(rate as u64),
            HumanDuration(left),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_bytes_rate_and_time() {
        let begin = Instant::now().checked_sub(Duration::from_secs(10)).expect("the machine is up that long");
        let lines = Lines { begin, last: begin, done: 1 << 30 };
        assert_eq!(lines.text(3 << 30), "1.00 GiB of 3.00 GiB, 102.40 MiB/s, 20 seconds left");
    }
}
