//! Metrics in a file, for node_exporter's textfile collector (which takes `*.prom` from its directory).
//!
//! A file is written beside and renamed: a reader sees all of it or the one before. The first line is a comment that says
//! whose file it is; one that does not say so is somebody else's, and is left alone.
//!
//! A command ends with what it has to tell, so what it tells is added to what is in the file: the last line, a comment as
//! well, has all sums so far. Two commands that end at once take turns by a lock on the directory.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::Exposition;
use super::run::{Operation, Run, Runs};

/// What the first line of a session's file begins with.
const OF_A_SESSION: &str = "# criu-ebpf track";
/// The first line of a file that commands add to.
const OF_COMMANDS: &str = "# criu-ebpf dump, pre-dump, restore: sums of all that named this file";
/// What the last line of such a file begins with.
const SUMS: &str = "# criu-ebpf sums ";

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
pub enum TextfileError {
    /// It cannot be written.
    #[error("the metrics file {path} cannot be written: {source}; see that its directory exists and is yours", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It would be overwritten.
    #[error("{path} exists already, and holds no metrics {of}; name another with --metrics-file, or remove it", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        of: &'static str,
    },
}

/// A file that a session writes again and again, and removes when it ends.
#[derive(Debug)]
pub struct SessionFile {
    path: PathBuf,
    first_line: String,
    has_failed: bool,
}

impl SessionFile {
    /// The file of the session of the tree below `root`. Nothing is written yet, but it could be: that is tried.
    pub fn new(path: PathBuf, root: i32) -> Result<Self, TextfileError> {
        if let Err(source) = tempfile::tempfile_in(directory(&path)) {
            return Err(TextfileError::Write { path, source });
        }
        match read(&path)? {
            Some(text) if !text.starts_with(OF_A_SESSION) => Err(TextfileError::Foreign { path, of: "of a session" }),
            _ => Ok(Self { path, first_line: format!("{OF_A_SESSION} {root}"), has_failed: false }),
        }
    }

    /// Writes it. Should that fail, it is said once, and tried again the next time.
    pub fn write(&mut self, exposition: &Exposition) -> Result<(), TextfileError> {
        let written = replace(&self.path, &format!("{}\n{}", self.first_line, exposition.text()));
        let outcome = written.map_err(|source| TextfileError::Write { path: self.path.clone(), source });
        if let Err(err) = &outcome
            && !self.has_failed
        {
            tracing::warn!(%err, "metrics are not written");
        }
        self.has_failed = outcome.is_err();
        outcome
    }
}

impl Drop for SessionFile {
    fn drop(&mut self) {
        // What is not tracked any more has no numbers. Another session may have taken the name meanwhile.
        if read(&self.path).is_ok_and(|text| text.is_some_and(|text| text.lines().next() == Some(&self.first_line))) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A file to which commands add what they came to.
#[derive(Debug)]
pub struct CommandFile {
    path: PathBuf,
}

impl CommandFile {
    /// A file to add to; it need not be there yet. That it can be is seen now, before anything is done.
    pub fn new(path: PathBuf) -> Result<Self, TextfileError> {
        let file = Self { path };
        let _lock = file.lock()?;
        let sums = file.sums()?;
        file.write(&sums)?;
        Ok(file)
    }

    /// Adds a run.
    pub fn add(&self, run: &Run) -> Result<(), TextfileError> {
        let _lock = self.lock()?;
        let mut sums = self.sums()?;
        sums.add(run);
        self.write(&sums)
    }

    fn lock(&self) -> Result<Flock<File>, TextfileError> {
        let opened = File::open(directory(&self.path)).map_err(|source| self.failed(source))?;
        Flock::lock(opened, FlockArg::LockExclusive).map_err(|(_, errno)| self.failed(errno.into()))
    }

    fn sums(&self) -> Result<Runs, TextfileError> {
        let foreign = || TextfileError::Foreign { path: self.path.clone(), of: "of dumps, pre-dumps and restores" };
        let Some(text) = read(&self.path)? else { return Ok(Runs::default()) };
        let sums =
            text.lines().last().filter(|_| text.starts_with(OF_COMMANDS)).and_then(|line| line.strip_prefix(SUMS));
        serde_json::from_str(sums.ok_or_else(foreign)?).map_err(|_| foreign())
    }

    fn write(&self, sums: &Runs) -> Result<(), TextfileError> {
        let mut exposition = Exposition::new([]);
        sums.expose(Operation::ALL, &mut exposition);
        let kept = serde_json::to_string(sums).map_err(|err| self.failed(err.into()))?;
        let text = format!("{OF_COMMANDS}\n{}{SUMS}{kept}\n", exposition.text());
        replace(&self.path, &text).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> TextfileError {
        TextfileError::Write { path: self.path.clone(), source }
    }
}

/// Longest file that is looked into; ours have some ten thousand bytes for each process that has series of its own.
const LONGEST: u64 = 16 << 20;

/// What is in a file, if it is there. Nothing but a file of text can be ours.
fn read(path: &Path) -> Result<Option<String>, TextfileError> {
    use std::io::Read;
    let failed = |source| TextfileError::Write { path: path.to_owned(), source };
    match path.symlink_metadata() {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(failed(err)),
        Ok(about) if !about.is_file() => {
            return Err(TextfileError::Foreign { path: path.to_owned(), of: "as it is no plain file" });
        }
        Ok(_) => {}
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Writes a file beside, readable for everybody, and gives it the name.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = tempfile::Builder::new()
        .prefix(".criu-ebpf-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(directory(path))?;
    beside.write_all(text.as_bytes())?;
    beside.persist(path)?;
    Ok(())
}

/// The directory that a file is in.
fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::super::run::Reason;
    use super::*;

    #[test]
    fn commands_add_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("criu.prom");
        for _ in 0..3 {
            let file = CommandFile::new(path.clone()).expect("a file to add to");
            file.add(&Run::failed(Operation::Restore, Reason::Pid)).expect("adding");
        }
        let text = std::fs::read_to_string(&path).expect("the file");
        assert!(
            text.contains("criu_ebpf_operation_failures_total{operation=\"restore\",reason=\"pid\"} 3\n"),
            "{text}"
        );
        let left: Vec<_> = std::fs::read_dir(dir.path()).expect("the directory").flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn commands_that_end_at_once_take_turns() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("criu.prom");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        let file = CommandFile::new(path.clone()).expect("a file to add to");
                        file.add(&Run::failed(Operation::Dump, Reason::Freeze)).expect("adding");
                    }
                });
            }
        });
        let text = std::fs::read_to_string(&path).expect("the file");
        assert!(text.contains("criu_ebpf_operations_total{operation=\"dump\",result=\"failed\"} 100\n"), "{text}");
    }

    #[test]
    fn files_of_others_are_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes");
        std::fs::write(&path, "mine\n").expect("a file");
        assert!(matches!(CommandFile::new(path.clone()), Err(TextfileError::Foreign { .. })));
        assert!(matches!(SessionFile::new(path.clone(), 1), Err(TextfileError::Foreign { .. })));
        assert_eq!(std::fs::read_to_string(&path).expect("the file"), "mine\n");
        // Neither takes the other's.
        let of_commands = dir.path().join("commands.prom");
        CommandFile::new(of_commands.clone()).expect("a file to add to");
        assert!(matches!(SessionFile::new(of_commands, 1), Err(TextfileError::Foreign { .. })));
        assert!(matches!(SessionFile::new(dir.path().to_owned(), 1), Err(TextfileError::Foreign { .. })));
    }

    #[test]
    fn a_session_takes_its_file_with_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tree.prom");
        let mut file = SessionFile::new(path.clone(), 7).expect("a new file");
        file.write(&Exposition::new([])).expect("writing");
        // Left of one that was killed: it is written over.
        let mut other = SessionFile::new(path.clone(), 8).expect("a file of a session");
        other.write(&Exposition::new([])).expect("writing");
        drop(file);
        assert!(path.exists(), "it is another's by now");
        drop(other);
        assert!(!path.exists());
    }
}
