//! `cargo xtask peer`: CRIU 4.2.1 beside the system, to measure against and to exchange images with.
//!
//! Debian 12's own CRIU does not start on recent kernels. The one in Debian's `sid` does, with the libraries it was
//! built for, so both are unpacked into `target/peer/root` by an apt that has its own lists, cache and (empty) package
//! status: nothing of the system is installed, configured or even read, except the address of its Debian mirror.
//! `target/peer/criu` is a script that starts it with those libraries.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

/// Where CRIU is unpacked to and started from, below the workspace root.
const PEER_DIR: &str = "target/peer";

/// `cargo xtask peer`: fetches the peer if it is not there and prints how to start it.
pub fn run(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "peer takes no arguments, got {args:?}");
    println!("{}", ensure_peer()?.display());
    Ok(())
}

/// Makes sure that the peer is there and starts, and returns the path of its start script.
pub fn ensure_peer() -> Result<PathBuf> {
    let dir = workspace_root()?.join(PEER_DIR);
    let script = dir.join("criu");
    if version(&script).is_ok() {
        return Ok(script);
    }
    eprintln!("fetching CRIU of Debian sid into {} (about 8 MB, nothing is installed)", dir.display());
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let packages = download(&dir)?;
    let root = dir.join("root");
    for package in packages {
        run_command(Command::new("dpkg").arg("-x").arg(&package).arg(&root))?;
    }
    write_script(&script, &root)?;
    let version = version(&script).context("CRIU was unpacked but does not start")?;
    eprintln!("{version}");
    Ok(script)
}

/// What the script says of itself, e.g. `Version: 4.2.1`.
pub fn version(script: &Path) -> Result<String> {
    let out =
        Command::new(script).arg("--version").output().with_context(|| format!("starting {}", script.display()))?;
    ensure!(out.status.success(), "{} --version: {}", script.display(), String::from_utf8_lossy(&out.stderr).trim());
    Ok(String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or_default().to_owned())
}

/// The root of the workspace that this xtask was built from.
pub fn workspace_root() -> Result<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).context("xtask has no parent directory")
}

/// Lets apt work out and download CRIU and everything it needs, as for a machine on which nothing is installed.
fn download(dir: &Path) -> Result<Vec<PathBuf>> {
    let source = dir.join("sid.sources");
    fs::write(&source, sid_source()?).with_context(|| format!("writing {}", source.display()))?;
    let lists = dir.join("lists/partial");
    let archives = dir.join("cache/archives/partial");
    for needed in [&lists, &archives] {
        fs::create_dir_all(needed).with_context(|| format!("creating {}", needed.display()))?;
    }
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .arg("-qq")
            .arg(format!("-oDir::Etc::sourcelist={}", source.display()))
            .args(["-oDir::Etc::sourceparts=/dev/null", "-oDir::State::status=/dev/null"])
            // A mirror may be weeks behind; what it has is signed all the same.
            .arg("-oAcquire::Check-Valid-Until=false")
            .arg(format!("-oDir::State::Lists={}", dir.join("lists").display()))
            .arg(format!("-oDir::Cache={}", dir.join("cache").display()))
            // The sandbox user `_apt` cannot write below a home directory; root is who builds here anyway.
            .arg("-oAPT::Sandbox::User=root")
            .args(args);
        run_command(&mut command)
    };
    apt(&["update"])?;
    apt(&["install", "--download-only", "--no-install-recommends", "--yes", "criu"])?;
    let archives = dir.join("cache/archives");
    let packages: Vec<PathBuf> = fs::read_dir(&archives)
        .with_context(|| format!("listing {}", archives.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    ensure!(!packages.is_empty(), "apt downloaded no package into {}", archives.display());
    Ok(packages)
}

/// This machine's own Debian source with the suite changed to `sid`, in deb822 form.
fn sid_source() -> Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut parts: Vec<PathBuf> = parts.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
        parts.sort();
        files.extend(parts);
    }
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let found = if file.extension().is_some_and(|extension| extension == "sources") {
            debian_uri_in_stanzas(&text)
        } else {
            debian_uri_in_lines(&text)
        };
        if let Some((uri, signed_by)) = found {
            let mut source = format!("Types: deb\nURIs: {uri}\nSuites: sid\nComponents: main\n");
            if let Some(key) = signed_by {
                source += &format!("Signed-By: {key}\n");
            }
            return Ok(source);
        }
    }
    bail!("no Debian mirror found in /etc/apt/sources.list or /etc/apt/sources.list.d: add one, sid is fetched from it")
}

/// The mirror and key of the first stanza that is Debian's main archive (not the security one).
fn debian_uri_in_stanzas(text: &str) -> Option<(String, Option<String>)> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(|v| v.trim().to_owned()))
        };
        let uri = field("URIs")?;
        let uri = uri.split_whitespace().next()?;
        is_main_archive(uri).then(|| (uri.to_owned(), field("Signed-By")))
    })
}

/// The same of the one-line form: `deb [options] URI suite components`.
fn debian_uri_in_lines(text: &str) -> Option<(String, Option<String>)> {
    text.lines().filter(|line| line.starts_with("deb ")).find_map(|line| {
        let uri = line.split_whitespace().find(|word| word.contains("://"))?;
        let key = line
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
            .and_then(|(options, _)| options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")));
        is_main_archive(uri).then(|| (uri.to_owned(), key.map(str::to_owned)))
    })
}

/// Whether a mirror's address is that of the archive that has `sid`: its last path component is `debian`.
fn is_main_archive(uri: &str) -> bool {
    uri.trim_end_matches('/').ends_with("/debian")
}

/// The start script. CRIU finds its page-transfer and plugin directories by itself; all it needs is its own loader and libraries.
fn write_script(script: &Path, root: &Path) -> Result<()> {
    let text = format!(
        "#!/bin/sh\n# CRIU of Debian sid with the libraries it was built for; made by `cargo xtask peer`.\nroot='{}'\n\
         exec \"$root/usr/lib64/ld-linux-x86-64.so.2\" --library-path \"$root/usr/lib/x86_64-linux-gnu\" \
         \"$root/usr/sbin/criu\" \"$@\"\n",
        root.display()
    );
    fs::write(script, text).with_context(|| format!("writing {}", script.display()))?;
    run_command(Command::new("chmod").arg("755").arg(script))
}

fn run_command(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
