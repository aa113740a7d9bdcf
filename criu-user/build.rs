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
    // Every description has room for every type of file; the large ones would make all of them large.
    for large in ["psk", "nlsk", "bpf", "isk", "usk"] {
        config.boxed(format!(".criu.file_entry.{large}"));
    }
    config.compile_fds(protox::compile(&files, [&dir])?)?;
    Ok(())
}
