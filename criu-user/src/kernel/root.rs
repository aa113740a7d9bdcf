//! Another root directory than our own: paths that start there, out of which no link leads.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::error::During;
use super::{SysError, SysResult};

/// The root directory of a restored tree: ours, or another.
#[derive(Debug, Clone, Default)]
pub struct Root(Option<PathBuf>);

impl Root {
    /// Another directory than our own root.
    pub fn at(path: &Path) -> SysResult<Self> {
        Ok(Self(Some(path.canonicalize().during("realpath", path.display())?)))
    }

    /// Whether it is another than ours.
    pub fn is_other(&self) -> bool {
        self.0.is_some()
    }

    /// Its path, where it is another than ours.
    pub fn path(&self) -> Option<&Path> {
        self.0.as_deref()
    }

    /// How a path in it is called from ours, word for word: links are not looked at.
    pub fn join(&self, path: &Path) -> PathBuf {
        match &self.0 {
            Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
            None => path.to_owned(),
        }
    }

    /// The way to a file in it: links are followed, and end in it.
    pub fn reach(&self, path: &Path) -> SysResult<PathBuf> {
        self.resolve(path, path.ancestors())
    }

    /// The way to a name in it, whatever the name is: only what leads to it is followed.
    pub fn place(&self, path: &Path) -> SysResult<PathBuf> {
        self.resolve(path, path.ancestors().skip(1))
    }

    /// Looks for the longest part of a path that is there. openat2(2) with RESOLVE_IN_ROOT, since Linux 5.6.
    fn resolve<'p>(&self, path: &Path, parts: impl Iterator<Item = &'p Path>) -> SysResult<PathBuf> {
        let Some(root) = &self.0 else { return Ok(path.to_owned()) };
        let dir = File::open(root).during("open", root.display())?;
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        for part in parts {
            match openat2(&dir, part, how) {
                Ok(found) => {
                    let found = super::proc::link(&format!("/proc/self/fd/{}", found.as_raw_fd()))?;
                    let rest = path.strip_prefix(part).unwrap_or(Path::new(""));
                    // Joining nothing would add a slash.
                    return Ok(if rest.as_os_str().is_empty() { found } else { found.join(rest) });
                }
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(SysError::new("openat2", part.display(), errno)),
            }
        }
        Ok(root.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn our_own_root_changes_nothing() {
        let root = Root::default();
        assert_eq!(root.join(Path::new("/a/b")), Path::new("/a/b"));
        assert_eq!(root.reach(Path::new("/no/such")).ok(), Some(PathBuf::from("/no/such")));
    }

    #[test]
    fn links_end_inside() {
        let dir = tempfile::tempdir().expect("a directory");
        let top = dir.path().canonicalize().expect("its path");
        std::fs::create_dir_all(top.join("usr/lib")).expect("mkdir");
        symlink("/usr/lib", top.join("lib")).expect("an absolute link");
        symlink("../../../../../usr", top.join("out")).expect("a link that leads out");
        let root = Root::at(&top).expect("a root");
        assert_eq!(root.reach(Path::new("/lib/x")).ok(), Some(top.join("usr/lib/x")));
        assert_eq!(root.reach(Path::new("/out/lib")).ok(), Some(top.join("usr/lib")));
        assert_eq!(root.place(Path::new("/lib")).ok(), Some(top.join("lib")));
        assert_eq!(root.reach(Path::new("/")).ok(), Some(top.clone()));
        assert_eq!(root.join(Path::new("/lib/x")), top.join("lib/x"));
    }
}
