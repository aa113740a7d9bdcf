//! A real Prometheus that scrapes a session, and is asked what the dashboard asks.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};

use e2e::{Options, Row, Survey, Workload};

use super::{Session, dashboard, document, eventually, exposition, free_port, promtool, value};

/// A server of its own: one configuration, one directory, one port.
struct Prometheus {
    child: Child,
    url: String,
}

impl Prometheus {
    fn start(dir: &Path, target: u16) -> Self {
        let port = free_port();
        let rules = document("dashboards/criu-ebpf-rules.yml");
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
             rule_files: ['{}']\n\
             scrape_configs: [{{job_name: criu-ebpf, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}]\n",
            rules.display(),
        );
        let file = dir.join("prometheus.yml");
        fs::write(&file, config).expect("its configuration");
        let log = fs::File::create(dir.join("prometheus.log")).expect("its log");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("prometheus").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("starting prometheus (install it: cargo xtask setup)");
        let server = Self { child, url: format!("http://127.0.0.1:{port}") };
        eventually("prometheus listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        server
    }

    /// The answer to a query, as JSON.
    fn query(&self, expression: &str) -> Vec<serde_json::Value> {
        let output = Command::new("promtool")
            .args(["query", "instant", "-o", "json", &self.url, expression])
            .output()
            .expect("starting promtool");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || said.contains("server error"), "{expression}: {said}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _: std::io::Result<()> = self.child.kill();
        let _: std::io::Result<_> = self.child.wait();
    }
}

/// Every query of every panel has data, for a tree that was dumped and that was not dumped for a reason.
#[test]
fn every_panel_has_data() {
    let row = Row::ours(Survey::Proc);
    let mut program = Workload::new("writes.c", "everything").env("GLIBC_TUNABLES", "glibc.pthread.rseq=0").start();
    let port = free_port();
    let session = Session::start(&program, &["--metrics", &port.to_string()]);
    let prometheus = Prometheus::start(program.dir(), port);

    let first = row.next_images(&program);
    row.dumper.pre_dump(&program, &first, None).expect_success();
    let second = row.next_images(&program);
    let mut options = Options::dump(&["--track-mem", "-R", "--prev-images-dir"]);
    options.dump.push(first.into());
    row.dumper.dump(&program, &second, &options).expect_success();
    let bad = Options::dump(&["-R", "--prev-images-dir", "/nowhere"]);
    assert!(!row.dumper.dump(&program, &row.next_images(&program), &bad).status.success());

    // Whoever tells the session does not wait until it has heard.
    for (series, expected) in [
        ("criu_ebpf_operations_total{tree=\"T\",operation=\"dump\",result=\"ok\"}", 1.0),
        ("criu_ebpf_operations_total{tree=\"T\",operation=\"dump\",result=\"failed\"}", 1.0),
        ("criu_ebpf_operations_total{tree=\"T\",operation=\"pre-dump\",result=\"ok\"}", 1.0),
        ("criu_ebpf_operation_failures_total{tree=\"T\",operation=\"dump\",reason=\"image\"}", 1.0),
        ("criu_ebpf_image_to_build_on{tree=\"T\"}", 1.0),
    ] {
        let series = series.replace('T', &program.pid().to_string());
        eventually(&format!("{series} {expected}"), || value(&exposition(port), &series) == expected);
    }
    let text = exposition(port);
    promtool(&["check", "metrics"], &text);
    assert!(value(&text, "criu_ebpf_written_bytes_total{") > 0.0, "a program that writes has written nothing");

    let tree = program.pid().to_string();
    let queries = dashboard::queries(&[("$instance", &format!("127.0.0.1:{port}")), ("$tree", &tree)]);
    assert!(queries.len() >= 15, "{} queries", queries.len());
    for (panel, query) in &queries {
        eventually(&format!("data for {panel:?}: {query}"), || {
            let series = prometheus.query(query);
            // A rate needs two scrapes, and a division something to divide.
            series.iter().any(|one| one["value"][1].as_str().is_some_and(|number| number != "NaN"))
        });
    }
    let variables = dashboard::variable_queries("127.0.0.1");
    assert!(!variables.is_empty());
    for query in variables {
        assert!(!prometheus.query(&query).is_empty(), "{query} has nothing to choose from");
    }
    session.stop();
    drop(session);
    program.finish();
}

/// The rules are in order, and alert when they should, by a file of promtool's.
#[test]
fn rules() {
    promtool(&["check", "rules", &document("dashboards/criu-ebpf-rules.yml").to_string_lossy()], "");
    let tests = e2e::workload::workspace().join("tests/e2e/metrics/rules.test.yml");
    promtool(&["test", "rules", &tests.to_string_lossy()], "");
}
