//! One round of one engine on one row.

use std::{
    any::Any,
    fmt, fs,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use e2e::{Program, Workload, proc};

use super::Row;
use crate::peer;

/// A tmpfs of huge pages in the bench's mount namespace.
pub const HUGE_PAGES: &str = "/run/huge-pages";

/// An engine that takes part.
#[derive(Debug)]
pub struct Contender {
    /// What it is called in the report.
    pub name: String,
    binary: PathBuf,
}

/// What one round measured.
#[derive(Clone, Debug)]
pub struct Sample {
    /// For how long the program stood still in a dump that left it running, as it saw it.
    pub frozen: Duration,
    /// How long the dump took that ended it.
    pub dump: Duration,
    /// How long the restore took.
    pub restore: Duration,
    /// How large the images are.
    pub image_bytes: u64,
    /// The engine's peak resident memory in the dump.
    pub dump_kib: u64,
    /// The engine's peak resident memory in the restore.
    pub restore_kib: u64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frozen {:.1?}, dump {:.1?}, restore {:.1?}", self.frozen, self.dump, self.restore)
    }
}

/// One call of an engine.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// How long it took.
    pub took: Duration,
    peak_kib: u64,
}

impl Contender {
    /// Our engine: `CRIU_EBPF_BIN`, else the release build.
    pub fn ours() -> Result<Self> {
        let default = peer::workspace_root()?.join("target/release/criu-ebpf");
        let binary = std::env::var_os("CRIU_EBPF_BIN").map_or(default, PathBuf::from);
        ensure!(binary.exists(), "{} is not there: cargo xtask build makes it", binary.display());
        Ok(Self { name: "criu-ebpf".to_owned(), binary })
    }

    /// CRIU, by its start script.
    pub fn peer(binary: PathBuf) -> Result<Self> {
        let version = peer::version(&binary)?;
        Ok(Self { name: format!("CRIU {}", version.trim_start_matches("Version: ")), binary })
    }

    /// The engine itself.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// One round, whose images are about as large as is said. What the harness reports by a panic becomes an error here.
    pub fn measure(&self, row: &Row, bytes: u64) -> Result<Sample> {
        self.guarded(|| self.round(row, bytes))
    }

    /// Runs a round of whatever kind, and makes an error of its panic.
    pub fn guarded<T>(&self, round: impl FnOnce() -> Result<T>) -> Result<T> {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let result = catch_unwind(AssertUnwindSafe(round));
        std::panic::set_hook(hook);
        result.unwrap_or_else(|panic| Err(anyhow!(first_line(&*panic))))
    }

    fn round(&self, row: &Row, bytes: u64) -> Result<Sample> {
        let mut program = Workload::new("bench.c", row.kind).arg(row.count).start();
        let (left_running, images) = (program.file("left-running"), program.file("images"));
        // Written pages of earlier rows must not be on their way to the disk meanwhile.
        run_quietly(Command::new("sync"))?;
        touch_memory(bytes);
        self.dump(&program, &left_running, &["-R"])?;
        program.next();
        let frozen = gap(&program)?;
        fs::remove_dir_all(&left_running).context("removing the first images")?;

        run_quietly(Command::new("sync"))?;
        let tree = program.tree();
        touch_memory(bytes);
        let dump = self.dump(&program, &images, &[])?;
        program.expect_gone(&tree);
        let image_bytes = size_of(&images)?;
        touch_memory(bytes);
        let restore = self.restore(&images, &[])?;
        ensure!(proc::exists(program.pid()), "restored, but pid {} is not there", program.pid());
        program.finish();
        Ok(Sample {
            frozen,
            dump: dump.took,
            restore: restore.took,
            image_bytes,
            dump_kib: dump.peak_kib,
            restore_kib: restore.peak_kib,
        })
    }

    /// Dumps a program.
    pub fn dump(&self, program: &Program, images: &Path, words: &[&str]) -> Result<Call> {
        fs::create_dir_all(images).with_context(|| format!("creating {}", images.display()))?;
        let pid = program.pid().to_string();
        self.call(images, "dump.log", ["dump", "-t", &pid].iter().chain(words))
    }

    /// Restores it, detached.
    pub fn restore(&self, images: &Path, words: &[&str]) -> Result<Call> {
        self.call(images, "restore.log", ["restore", "-d"].iter().chain(words))
    }

    /// Runs the engine as its users do, with the log at its default level.
    fn call<'a>(&self, images: &Path, log: &str, words: impl Iterator<Item = &'a &'a str>) -> Result<Call> {
        let measure = Workload::new("measure.c", "").command.swap_remove(0);
        let figures = images.join("figures");
        let mut command = Command::new(measure);
        command.arg(&figures).arg(&self.binary).args(words).arg("-D").arg(images).args(["-o", log]);
        let status = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("starting {command:?}"))?;
        if !status.success() {
            let text = fs::read(images.join(log)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let reason = text.lines().find(|line| line.contains("Error")).unwrap_or("its log says nothing");
            bail!("{log}: {status}: {}", reason.trim());
        }
        let text = fs::read_to_string(&figures).with_context(|| format!("reading {}", figures.display()))?;
        fs::remove_file(&figures).with_context(|| format!("removing {}", figures.display()))?;
        let (took, peak) = text.trim().split_once(' ').context("the figures of measure")?;
        Ok(Call { took: Duration::from_nanos(took.parse()?), peak_kib: peak.parse()? })
    }
}

/// Has the kernel touch more memory than an engine is going to use for images of so many bytes, and frees it again. In a
/// virtual machine the first touch of a page is a fault on the host, ten times as dear as all else; and it is the first
/// again when the page has been free for two seconds, because the kernel reports free pages to the host
/// (Documentation/mm/free_page_reporting.rst). Without it chance decides which engine gets pages that the host has taken
/// back.
///
/// It is done with huge pages and with small ones: small ones come out of what is in pieces already, which is never
/// reported, so that they alone would leave untouched what an engine gets that writes much at a time.
pub fn touch_memory(bytes: u64) {
    const MORE: u64 = 384 << 20;
    let bytes = bytes + MORE;
    let small = PathBuf::from(format!("/dev/shm/xtask-bench-{}", std::process::id()));
    let huge = Path::new(HUGE_PAGES).join("touched");
    let write = |name: &Path| -> std::io::Result<()> {
        let mut file = fs::File::create(name)?;
        let part = vec![0; 2 << 20];
        (0..bytes >> 21).try_for_each(|_| file.write_all(&part))
    };
    for name in [&huge, &small] {
        // Without room for it the figures are only less even.
        if let Err(error) = write(name) {
            eprintln!("touching memory by {}: {error}", name.display());
        }
        let _: std::io::Result<()> = fs::remove_file(name);
    }
}

/// The first line of what a panic says.
fn first_line(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("a panic without words").to_owned()
}

/// What the program says of the longest time between two of its looks at the clock.
pub fn gap(program: &Program) -> Result<Duration> {
    let log = program.log();
    let mut gaps = log.lines().filter_map(|line| line.strip_prefix("gap "));
    let nanoseconds = gaps.next_back().context("the program logged no gap")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

/// The longest of these times that overlaps one span of time. What took less than a millisecond is not among them: where
/// there is none at all, the program was not looking.
pub fn gap_within(program: &Program, from: SystemTime, to: SystemTime) -> Result<Duration> {
    let since_epoch = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (from, to) = (since_epoch(from), since_epoch(to));
    let log = program.log();
    let gaps = log.lines().filter_map(|line| {
        let (begin, length) = line.strip_prefix("stood ")?.split_once(' ')?;
        Some((Duration::from_nanos(begin.parse().ok()?), Duration::from_nanos(length.parse().ok()?)))
    });
    let inside = gaps.filter(|(begin, length)| *begin < to && *begin + *length > from);
    inside.map(|(_, length)| length).max().context("the program saw no gap of a millisecond in the freeze")
}

/// What all files of an image directory hold together, without logs and statistics.
fn size_of(images: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(images).with_context(|| format!("listing {}", images.display()))? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "img") {
            sum += entry.metadata()?.len();
        }
    }
    Ok(sum)
}

fn run_quietly(mut command: Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
