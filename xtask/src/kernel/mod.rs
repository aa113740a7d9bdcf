//! `cargo xtask kernel [SUITE [TEST…]]`: end-to-end tests on the kernels of Debian's releases, in a virtual machine.
//!
//! The virtual machine has the files of this one, all of them but read only, below a file system in its memory: the tests
//! find the checkout, its binaries and every program where they are. Only the kernel is another. It is Debian's package,
//! unpacked below `target/kernels`; nothing is installed. Where the processor cannot do it (KVM), qemu
//! translates, and everything takes ten times as long.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::debian;
use crate::process::{cargo, engine, find, output, run as run_command, target_dir};

/// One line for the list of tasks.
pub const ABOUT: &str =
    "end-to-end tests on other kernels, in a virtual machine; `kernel bookworm TEST…`: some on one of them";

const INIT: &str = include_str!("init.sh");
const START: &str = include_str!("start.sh");

/// A release of Debian's, and the tests that are run on its kernel if none are named: of what is done in another way there.
struct Release {
    suite: &'static str,
    tests: &'static [&'static str],
}

const RELEASES: [Release; 2] = [
    // Linux 6.1: no PAGEMAP_SCAN, no WP_ASYNC, no tcx.
    Release {
        suite: "bookworm",
        tests: &[
            "track::soft_dirty",
            "track::other_process",
            "track::remap",
            "track::dontneed",
            "track::huge_pages",
            "memory::private_anonymous",
            "memory::zeroed_pages",
            "memory::huge_pages",
            "memory::copy_on_write",
            "pipes::content",
            "sessions::children_are_followed",
            "sessions::killed_at_any_moment",
            "tcp::close_wait_v4",
            "tcp::killed::dump::",
            "tcp::clsact::remote_v6",
            "tcp::nftables::close_wait",
            "tcp::tls::tls12",
            "timers::posix_timers",
            "programs::python",
        ],
    },
    // Linux 6.12: both kinds of marks, and TLS.
    Release { suite: "trixie", tests: &["track::soft_dirty", "track::stores", "memory::zeroed_pages", "tcp::tls::"] },
];

/// Drivers without which the machine has no files.
const MODULES: [&str; 6] = ["virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_blk", "ext4"];
const MEMORY: &str = "6G";
/// Bytes of the disk for what the tests write.
const DISK: u64 = 8 << 30;
/// Seconds after which the machine is switched off.
const LIMIT: &str = "1200";

/// Runs the tests, on all kernels if none is named.
pub fn run(args: &[String]) -> Result<()> {
    crate::setup::for_tests()?;
    crate::build::run(&[])?;
    let Some((suite, named)) = args.split_first() else { return on_all() };
    let release = RELEASES.iter().find(|release| release.suite == suite);
    let known = || RELEASES.map(|release| release.suite).join(" and ");
    let release = release.with_context(|| format!("{suite}: no such release; there are {}", known()))?;
    crate::setup::for_kernels()?;
    let named: Vec<&str> = named.iter().map(String::as_str).collect();
    on(release.suite, if named.is_empty() { release.tests } else { &named })
}

/// On each kernel the tests that are meant for it, with the engine as it is built.
pub fn on_all() -> Result<()> {
    crate::setup::for_kernels()?;
    RELEASES.iter().try_for_each(|release| on(release.suite, release.tests))
}

/// Runs tests on the kernel of a suite.
fn on(suite: &str, tests: &[&str]) -> Result<()> {
    let dir = target_dir().join("kernels").join(suite);
    let kernel = Kernel::ensure(&dir, suite)?;
    let binary = tests_binary()?;
    let words: Vec<String> = tests.iter().map(|name| quoted(name)).collect();
    let job = format!(
        "cd {} && CRIU_EBPF_BIN={} RUST_BACKTRACE=0 exec {} --color=never --test-threads=2 {}\n",
        quoted(&crate::process::root().join("tests").to_string_lossy()),
        quoted(&engine().to_string_lossy()),
        quoted(&binary.to_string_lossy()),
        words.join(" "),
    );
    write(&dir.join("start.sh"), START)?;
    write(&dir.join("job.sh"), &job)?;
    let status = kernel.boot(&dir)?;
    ensure!(status == "0", "the tests on the kernel of {suite} ended with status {status}");
    Ok(())
}

/// A kernel, and what it begins with.
struct Kernel {
    image: PathBuf,
    initramfs: PathBuf,
}

impl Kernel {
    /// Fetches it, if it is not there.
    fn ensure(dir: &Path, suite: &str) -> Result<Self> {
        let root = dir.join("root");
        let image = || Some(only_one(&root.join("boot"), "vmlinuz-")?.0);
        if image().is_none() {
            eprintln!(
                "fetching the kernel of Debian {suite} into {} (about 100 MB, nothing is installed)",
                dir.display()
            );
            let packages = debian::fetch(dir, suite, "linux-image-amd64")?;
            let is_kernel = |path: &&PathBuf| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("linux-image-"))
            };
            for package in packages.iter().filter(is_kernel) {
                run_command(Command::new("dpkg").arg("-x").arg(package).arg(&root))?;
            }
        }
        let image = image().with_context(|| format!("no kernel in {}", root.display()))?;
        let initramfs = dir.join("initramfs");
        pack(&root, &initramfs)?;
        Ok(Self { image, initramfs })
    }

    /// Starts it, and gives the status that the tests ended with.
    fn boot(&self, dir: &Path) -> Result<String> {
        let disk = dir.join("disk");
        fs::File::create(&disk).and_then(|file| file.set_len(DISK)).context("making a disk")?;
        let mut machine = Command::new("timeout");
        machine.args([LIMIT, "qemu-system-x86_64", "-machine", "q35", "-accel", accelerator()]);
        machine.args(["-cpu", "max", "-smp", "2", "-m", MEMORY, "-nographic", "-no-reboot", "-nic", "none"]);
        machine.arg("-kernel").arg(&self.image).arg("-initrd").arg(&self.initramfs);
        machine.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 KERNEL_DIR={}", dir.display()));
        machine.args(["-virtfs", "local,path=/,mount_tag=files,security_model=none,readonly=on,multidevs=remap"]);
        machine.arg("-drive").arg(format!("file={},format=raw,if=virtio,cache=unsafe", disk.display()));
        let mut machine = machine.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting qemu")?;
        let mut status = None;
        let console = BufReader::new(machine.stdout.take().context("the console")?);
        for line in console.split(b'\n') {
            let line = String::from_utf8_lossy(&line.context("reading the console")?).trim_end().to_owned();
            // The firmware clears the screen.
            let line = line.rsplit('\u{1b}').next().map_or("", |last| last.strip_prefix("[2J").unwrap_or(last));
            match line.strip_prefix("ended with status ") {
                Some(said) => status = Some(said.to_owned()),
                None => println!("{line}"),
            }
        }
        machine.wait().context("waiting for qemu")?;
        fs::remove_file(&disk)?;
        status.context("the virtual machine ended before the tests")
    }
}

/// What runs the machine's code: the processor, if it says that it can. A device that is there proves nothing.
fn accelerator() -> &'static str {
    let is_able = fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        flags.split_ascii_whitespace().any(|flag| flag == "svm" || flag == "vmx")
    });
    // One thread for all processors: with one each, qemu 7.2 now and then goes on executing an instruction that another
    // processor has patched, a breakpoint that is gone (the kernel's jump labels), and that processor never gets any further.
    if is_able && Path::new("/dev/kvm").exists() { "kvm" } else { "tcg,thread=single" }
}

/// Packs what the kernel begins with: a shell, the drivers, and the script.
fn pack(root: &Path, into: &Path) -> Result<()> {
    let place = into.with_extension("d");
    if place.exists() {
        fs::remove_dir_all(&place)?;
    }
    for name in ["proc", "sys", "dev", "modules", "below", "above", "root"] {
        fs::create_dir_all(place.join(name))?;
    }
    let busybox = find("busybox").context("there is no busybox")?;
    fs::copy(busybox, place.join("busybox"))?;
    write(&place.join("init"), INIT)?;
    fs::set_permissions(place.join("init"), fs::Permissions::from_mode(0o755))?;
    // Newer packages have it in /usr only, as all of Debian has.
    if !root.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", root.join("lib"))?;
    }
    let (_, version) = only_one(&root.join("lib/modules"), "").context("no modules")?;
    run_command(Command::new("depmod").arg("-b").arg(root).arg(&version))?;
    let mut modules: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let mut ask = Command::new("modprobe");
        ask.arg("-d").arg(root).args(["-S", &version, "--show-depends", module]);
        let said = output(&mut ask).with_context(|| format!("there is no module {module}"))?;
        let needed =
            said.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|path| PathBuf::from(path.trim()));
        needed.for_each(|path| {
            if !modules.contains(&path) {
                modules.push(path)
            }
        });
    }
    for (n, module) in modules.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let to = place.join("modules").join(format!("{n:02}-{name}"));
        fs::copy(module, &to)?;
        if name.ends_with(".xz") {
            output(Command::new("xz").arg("-d").arg(&to)).context("unpacking a module")?;
        }
    }
    let packing = format!(
        "cd {} && find . | cpio -o -H newc --quiet > {}",
        quoted(&place.to_string_lossy()),
        quoted(&into.to_string_lossy())
    );
    run_command(Command::new("sh").args(["-c", &packing]))
}

/// The binary of the end-to-end tests, built if need be.
fn tests_binary() -> Result<PathBuf> {
    let build = ["test", "--package", "e2e", "--test", "e2e", "--no-run", "--message-format=json"];
    let said = output(cargo().args(build)).context("the end-to-end tests cannot be built")?;
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        let is_ours = message["target"]["name"] == "e2e" && message["target"]["kind"][0] == "test";
        is_ours.then(|| message["executable"].as_str().map(PathBuf::from))?
    };
    said.lines().find_map(executable).context("cargo does not say where the end-to-end tests are")
}

/// The only entry of a directory whose name begins so: its path and name.
fn only_one(dir: &Path, prefix: &str) -> Option<(PathBuf, String)> {
    let entries = fs::read_dir(dir).ok()?.flatten();
    let mut named = entries.map(|entry| (entry.path(), entry.file_name().to_string_lossy().into_owned()));
    named.find(|(_, name)| name.starts_with(prefix))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
