//! `--action-script`: programs of the user's that act at certain moments, with CRIU's variables in their environment.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

use nix::unistd::Pid;
use tracing::info;

use super::common::Common;
use super::error::CliError;
use crate::observer::Moment;

/// The scripts of a command.
#[derive(Debug)]
pub(super) struct Scripts {
    /// Absolute: they are run in the work directory, and named where the command was typed.
    paths: Vec<PathBuf>,
    images_dir: PathBuf,
    work_dir: PathBuf,
}

/// Why a script has not done its work.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScriptError {
    /// It was not started.
    #[error("the action script {path} cannot be run: {source}", path = path.display())]
    Start { path: PathBuf, source: std::io::Error },
    /// It says so itself.
    #[error("the action script {path} failed ({status})", path = path.display())]
    Failed { path: PathBuf, status: ExitStatus },
}

impl Scripts {
    /// Those that the options name; none is run yet, but that they can be is looked at.
    pub fn new(common: &Common) -> Result<Self, CliError> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let paths: Vec<PathBuf> = common.action_script.iter().map(absolute).collect();
        for path in &paths {
            let wrong = |what: String| CliError::Script { path: path.clone(), what };
            let meta = path.metadata().map_err(|e| wrong(e.to_string()))?;
            if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
                return Err(wrong("it is no executable file".into()));
            }
        }
        Ok(Self { paths, images_dir: absolute(&common.images_dir), work_dir: absolute(&common.work_dir()) })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// Runs all, one after the other; the first that fails is the last.
    pub fn run(&self, moment: Moment, root: Option<Pid>) -> Result<(), ScriptError> {
        for path in &self.paths {
            info!(script = %path.display(), "action script at {moment}");
            let mut command = Command::new(path);
            command.current_dir(&self.work_dir);
            command.env("CRTOOLS_SCRIPT_ACTION", moment.name()).env("CRTOOLS_IMAGE_DIR", &self.images_dir);
            match root {
                Some(pid) => command.env("CRTOOLS_INIT_PID", pid.to_string()),
                None => command.env_remove("CRTOOLS_INIT_PID"),
            };
            let status = command.status().map_err(|source| ScriptError::Start { path: path.clone(), source })?;
            if !status.success() {
                return Err(ScriptError::Failed { path: path.clone(), status });
            }
        }
        Ok(())
    }
}
