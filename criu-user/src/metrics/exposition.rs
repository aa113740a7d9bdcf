//! Numbers, and the two texts that they become.
//!
//! Prometheus asks for OpenMetrics where it can; files for node_exporter, and what else reads the older format, get the
//! same with the older format's headers.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Registry;

use super::histogram::Histogram;
use super::table::{self, Metric};

/// What is told of one moment. The series of a metric must be told one after the other.
#[derive(Debug, Clone)]
pub struct Exposition {
    /// What all series say.
    labels: Vec<(&'static str, String)>,
    families: Vec<Family>,
}

#[derive(Debug, Clone)]
struct Family {
    metric: &'static Metric,
    series: Vec<(Vec<(&'static str, String)>, Value)>,
}

#[derive(Debug, Clone)]
enum Value {
    Info,
    Counter(u64),
    Gauge(f64),
    Histogram(Histogram),
}

impl Exposition {
    /// One whose series all have these labels. It tells which engine it is from.
    pub fn new(labels: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        let mut exposition = Self { labels: labels.into_iter().collect(), families: Vec::new() };
        exposition.info(&table::BUILD, &[("version", env!("CARGO_PKG_VERSION"))]);
        exposition
    }

    /// A fact that is told in labels.
    pub fn info(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)]) {
        self.add(metric, labels, Value::Info);
    }

    /// What only grows.
    pub fn counter(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: u64) {
        self.add(metric, labels, Value::Counter(value));
    }

    /// What goes up and down.
    pub fn gauge(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: f64) {
        self.add(metric, labels, Value::Gauge(value));
    }

    /// Times.
    pub fn histogram(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: &Histogram) {
        self.add(metric, labels, Value::Histogram(value.clone()));
    }

    fn add(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: Value) {
        let labels = labels.iter().map(|&(name, label)| (name, label.to_owned())).collect();
        match self.families.last_mut().filter(|family| std::ptr::eq(family.metric, metric)) {
            Some(family) => family.series.push((labels, value)),
            None => self.families.push(Family { metric, series: vec![(labels, value)] }),
        }
    }

    /// As OpenMetrics text, version 1.0.0.
    pub fn openmetrics(&self) -> String {
        let labels = self.labels.iter().map(|(name, label)| ((*name).into(), label.clone().into()));
        let mut registry = Registry::with_labels(labels);
        registry.register_collector(Box::new(Families(self.families.clone())));
        let mut text = String::new();
        // Writing to memory does not fail.
        let _ = encode(&mut text, &registry);
        text
    }

    /// In Prometheus's text format, version 0.0.4: its headers name the series of counters and facts, not their families,
    /// and it has no units and no end.
    pub fn text(&self) -> String {
        let openmetrics = self.openmetrics();
        let mut lines = Vec::new();
        let mut help = "";
        for line in openmetrics.lines() {
            match line.splitn(4, ' ').collect::<Vec<_>>()[..] {
                ["#", "HELP", _, words] => help = words,
                ["#", "TYPE", family, kind] => {
                    let (suffix, kind) = match kind {
                        "counter" => ("_total", "counter"),
                        "info" => ("_info", "gauge"),
                        other => ("", other),
                    };
                    lines.push(format!("# HELP {family}{suffix} {help}"));
                    lines.push(format!("# TYPE {family}{suffix} {kind}"));
                }
                ["#", ..] => {}
                _ => lines.push(line.to_owned()),
            }
        }
        lines.push(String::new());
        lines.join("\n")
    }
}

/// What the encoder gets.
#[derive(Debug)]
struct Families(Vec<Family>);

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for Family { metric, series } in &self.0 {
            let unit = metric.of.unit();
            let mut family = encoder.encode_descriptor(metric.name, metric.help, unit.as_ref(), metric.kind)?;
            for (labels, value) in series {
                match value {
                    Value::Info => family.encode_info(labels)?,
                    Value::Counter(value) => {
                        let mut series = family.encode_family(labels)?;
                        series.encode_counter(value, None::<&Exemplar<NoLabelSet, f64>>)?;
                    }
                    Value::Gauge(value) => family.encode_family(labels)?.encode_gauge(value)?,
                    Value::Histogram(times) => {
                        let mut series = family.encode_family(labels)?;
                        series.encode_histogram::<NoLabelSet>(times.sum(), times.count(), &times.buckets(), None)?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposition() -> Exposition {
        let mut exposition = Exposition::new([("tree", "7".to_owned())]);
        exposition.counter(&table::WRITTEN, &[], 4096);
        exposition.gauge(&table::PROCESS_MEMORY, &[("process", "8"), ("comm", "a\"b\\c\nd")], 1.0);
        exposition.gauge(&table::PROCESS_MEMORY, &[("process", "other"), ("comm", "")], 2.5);
        exposition
    }

    #[test]
    fn openmetrics_has_units_and_an_end() {
        let text = exposition().openmetrics();
        let expected = format!(
            concat!(
                "# HELP criu_ebpf_build The engine that tells this.\n",
                "# TYPE criu_ebpf_build info\n",
                "criu_ebpf_build_info{{tree=\"7\",version=\"{}\"}} 1\n",
                "# HELP criu_ebpf_written_bytes {}\n",
                "# TYPE criu_ebpf_written_bytes counter\n",
                "# UNIT criu_ebpf_written_bytes bytes\n",
                "criu_ebpf_written_bytes_total{{tree=\"7\"}} 4096\n",
                "# HELP criu_ebpf_process_memory_bytes {}\n",
                "# TYPE criu_ebpf_process_memory_bytes gauge\n",
                "# UNIT criu_ebpf_process_memory_bytes bytes\n",
                "criu_ebpf_process_memory_bytes{{tree=\"7\",process=\"8\",comm=\"a\\\"b\\\\c\\nd\"}} 1.0\n",
                "criu_ebpf_process_memory_bytes{{tree=\"7\",process=\"other\",comm=\"\"}} 2.5\n",
                "# EOF\n"
            ),
            env!("CARGO_PKG_VERSION"),
            table::WRITTEN.help,
            table::PROCESS_MEMORY.help,
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn the_older_format_names_series() {
        let text = exposition().text();
        assert!(text.contains(
            "# TYPE criu_ebpf_written_bytes_total counter\ncriu_ebpf_written_bytes_total{tree=\"7\"} 4096\n"
        ));
        assert!(text.contains("# TYPE criu_ebpf_build_info gauge\ncriu_ebpf_build_info{"));
        assert!(text.contains("# HELP criu_ebpf_written_bytes_total Memory found"));
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"));
        assert!(text.ends_with("2.5\n"));
    }
}
