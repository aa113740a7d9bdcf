//! Packages of any suite of Debian, without a trace on the system: by an apt that has its own lists, cache and (empty)
//! package status. Nothing is installed, configured or even read, except the address of this machine's Debian mirror.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process::run as run_command;

/// Lets apt work out and download a package of a suite and everything that it needs, as for a machine on which nothing is
/// installed, into `dir`.
pub fn fetch(dir: &Path, suite: &str, package: &str) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let list = dir.join(format!("{suite}.sources"));
    fs::write(&list, source(suite)?).with_context(|| format!("writing {}", list.display()))?;
    let lists = dir.join("lists/partial");
    let archives = dir.join("cache/archives/partial");
    for needed in [&lists, &archives] {
        fs::create_dir_all(needed).with_context(|| format!("creating {}", needed.display()))?;
    }
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .arg("-qq")
            .arg(format!("-oDir::Etc::sourcelist={}", list.display()))
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
    apt(&["install", "--download-only", "--no-install-recommends", "--yes", package])?;
    let archives = dir.join("cache/archives");
    let packages: Vec<PathBuf> = fs::read_dir(&archives)
        .with_context(|| format!("listing {}", archives.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    ensure!(!packages.is_empty(), "apt downloaded no package into {}", archives.display());
    Ok(packages)
}

/// This machine's own Debian source with another suite, in deb822 form.
fn source(suite: &str) -> Result<String> {
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
            let mut source = format!("Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n");
            if let Some(key) = signed_by {
                source += &format!("Signed-By: {key}\n");
            }
            return Ok(source);
        }
    }
    bail!(
        "no Debian mirror found in /etc/apt/sources.list or /etc/apt/sources.list.d: add one, {suite} is fetched from it"
    )
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

/// Whether a mirror's address is that of the archive that has all suites: its last path component is `debian`.
fn is_main_archive(uri: &str) -> bool {
    uri.trim_end_matches('/').ends_with("/debian")
}
