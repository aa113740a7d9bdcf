//! Options of every command that works on images.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args};

/// Options of every command that works on images.
#[derive(Debug, Args)]
pub(super) struct Common {
    /// Directory of the images
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Directory of log files, pid files and statistics [default: the images directory]
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Write the log to a file in the work directory instead of to standard error
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// How much to log: 0 nothing, 1 errors, 2 warnings, 3 the story, 4 everything; without a number, one more each time
    /// [default: 2]
    #[arg(short = 'v', long, value_name = "LEVEL", num_args = 0..=1, default_missing_value = "", action = ArgAction::Append)]
    verbosity: Vec<Verbosity>,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(long, conflicts_with_all = ["json", "display_stats"])]
    pub quiet: bool,
    /// Print what is in the statistics file as well
    #[arg(long)]
    pub display_stats: bool,
    /// Ignore configuration files (there are none; taken for compatibility with CRIU)
    #[arg(long)]
    no_default_config: bool,
    /// Run this program at the moments that CRTOOLS_SCRIPT_ACTION names in its environment; may be given several times
    #[arg(long, value_name = "FILE")]
    pub action_script: Vec<PathBuf>,
    /// Write a zero byte to this descriptor and close it once the images are complete, or the tree runs
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub status_fd: Option<i32>,
    /// Which features of the processor the images depend on; "none" is all there is: images have no list of them
    #[arg(long, value_name = "CAP", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    cpu_cap: Option<NoCpuCap>,
}

impl Common {
    /// Where logs, pid files and statistics go.
    pub fn work_dir(&self) -> PathBuf {
        self.work_dir.clone().unwrap_or_else(|| self.images_dir.clone())
    }

    /// How much is logged, 0 to 4.
    pub fn verbosity(&self) -> u8 {
        const DEFAULT: u8 = 2;
        self.verbosity.iter().fold(DEFAULT, |level, step| match step {
            Verbosity::Level(level) => *level,
            Verbosity::Louder(by) => level.saturating_add(*by),
        })
    }

    /// Makes the directory of a dump if it is not there: the log is opened in it before anything else.
    pub fn make_images_dir(&self) {
        // Whoever opens it says what is wrong.
        let _ = std::fs::DirBuilder::new().mode(0o700).create(&self.images_dir);
    }
}

/// `-v4`, `-v`, `-vvv`: a level, or so many more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verbosity {
    Level(u8),
    Louder(u8),
}

impl FromStr for Verbosity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The first letter is the option itself.
        if text.bytes().all(|byte| byte == b'v') && text.len() < u8::MAX as usize {
            return Ok(Self::Louder(text.len() as u8 + 1));
        }
        text.parse().map(Self::Level).map_err(|_| "levels are 0 to 4; -v is one more".to_owned())
    }
}

/// The one list of processor features that is supported.
#[derive(Debug, Clone, Copy)]
struct NoCpuCap;

impl FromStr for NoCpuCap {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WHY: &str = "images hold no list of processor features; a restore fails by itself where the registers do \
                           not fit; leave it out or say none";
        if text == "none" { Ok(Self) } else { Err(WHY) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        common: Common,
    }

    fn level(words: &[&str]) -> u8 {
        let line = <Line as clap::Parser>::try_parse_from([&["x"], words].concat());
        line.unwrap_or_else(|err| panic!("{words:?}: {err}")).common.verbosity()
    }

    #[test]
    fn verbosity_is_said_in_all_ways_of_criu() {
        assert_eq!(level(&[]), 2);
        assert_eq!(level(&["-v0"]), 0);
        assert_eq!(level(&["-v4"]), 4);
        assert_eq!(level(&["--verbosity=3"]), 3);
        assert_eq!(level(&["-v"]), 3);
        assert_eq!(level(&["-v", "-v"]), 4);
        assert_eq!(level(&["-vvvv"]), 6);
        assert_eq!(level(&["-v", "--quiet"]), 3);
    }
}
