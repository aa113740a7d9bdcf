//! What has to exist before the engine can be compiled: the image messages, and the eBPF programs (`build/ebpf.rs`).
//!
//! The descriptions of the messages in `proto/` are turned into Rust. protox compiles them, so no protoc is needed.

#[path = "build/ebpf.rs"]
mod ebpf;

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    ebpf::build();
    messages()
}

fn messages() -> Result<(), Box<dyn Error>> {
    let dir = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../proto");
    println!("cargo:rerun-if-changed={}", dir.display());

    let mut files = Vec::new();
    for entry in fs::read_dir(&dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "proto") {
            println!("cargo:rerun-if-changed={}", path.display());
            files.push(path);
        }
    }
    // The order of a directory is chance; the output should not be.
    files.sort();

    let mut config = prost_build::Config::new();
    config.type_attribute(".", "#[derive(serde::Serialize)]");
    // A description is of one type, and its message has a field for each: all together take a kilobyte.
    for one in [
        "reg", "memfd", "ext", "nsf", "pidfd", "tty", "bpf", "tunf", "pipe", "fifo", "usk", "isk", "psk", "nlsk",
        "efd", "epfd", "sgfd", "tfd", "ify", "ffy",
    ] {
        config.boxed(format!(".criu.file_entry.{one}"));
    }
    config.compile_fds(protox::compile(&files, [&dir])?)?;
    Ok(())
}
