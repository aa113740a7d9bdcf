//! The dashboard: that Grafana can import it, and what it asks.

use std::fs;

use serde_json::Value;

use super::{document, documents};

fn dashboard() -> Value {
    let path = document("dashboards/criu-ebpf.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// The panels, those in rows as well; rows themselves are none.
fn panels(dashboard: &Value) -> Vec<Value> {
    let all = dashboard["panels"].as_array().expect("panels");
    let inner = |panel: &Value| panel["panels"].as_array().cloned().unwrap_or_default();
    let mut panels: Vec<Value> = all.iter().filter(|panel| panel["type"] != "row").cloned().collect();
    panels.extend(all.iter().flat_map(inner));
    panels
}

/// Every query, with the title of its panel, and with values for the variables.
pub(super) fn queries(values: &[(&str, &str)]) -> Vec<(String, String)> {
    let dashboard = dashboard();
    let query = |panel: &Value, target: &Value| {
        let mut text = target["expr"].as_str().expect("an expression").to_owned();
        for (name, value) in values.iter().chain(&[("$__rate_interval", "10s"), ("$__range", "1m")]) {
            text = text.replace(name, value);
        }
        assert!(!text.contains('$'), "a variable that nobody has set: {text}");
        (panel["title"].as_str().expect("a title").to_owned(), text)
    };
    let of_panel = |panel: &Value| {
        let targets = panel["targets"].as_array().expect("targets").clone();
        targets.iter().map(|target| query(panel, target)).collect::<Vec<_>>()
    };
    panels(&dashboard).iter().flat_map(of_panel).collect()
}

/// What the variables are filled from.
pub(super) fn variable_queries(instance: &str) -> Vec<String> {
    let variables = dashboard()["templating"]["list"].as_array().expect("variables").clone();
    let query = |variable: &Value| {
        let text = variable["query"]["query"].as_str()?;
        let inner = text.split_once('(')?.1.strip_suffix(')')?;
        let metric = inner.rsplit_once(", ").map_or(inner, |(metric, _label)| metric);
        Some(metric.replace("$instance", &format!("{instance}.*")))
    };
    variables.iter().filter_map(query).collect()
}

/// Grafana itself is not to be had from Debian: what it needs of a dashboard is looked at here.
#[test]
fn is_complete() {
    let dashboard = dashboard();
    assert!(dashboard["schemaVersion"].as_i64().is_some_and(|version| version >= 39));
    assert!(dashboard["id"].is_null(), "an id is of one Grafana");
    assert!(dashboard["uid"].as_str().is_some_and(|uid| !uid.is_empty() && uid.len() <= 40));
    assert!(dashboard["title"].as_str().is_some_and(|title| !title.is_empty()));
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let named = |name: &str| variables.iter().find(|variable| variable["name"] == name).expect("a variable");
    assert_eq!(named("datasource")["type"], "datasource");
    assert_eq!(named("datasource")["query"], "prometheus");
    for name in ["instance", "tree"] {
        assert_eq!(named(name)["type"], "query");
        assert_eq!(named(name)["datasource"]["uid"], "${datasource}");
    }
    let panels = panels(&dashboard);
    let mut ids: Vec<i64> = panels.iter().map(|panel| panel["id"].as_i64().expect("an id")).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), panels.len(), "panels with one id");
    for panel in &panels {
        let title = panel["title"].as_str().expect("a title");
        assert!(!title.is_empty());
        assert!(panel["description"].as_str().is_some_and(|text| !text.is_empty()), "{title}: no description");
        assert!(
            panel["fieldConfig"]["defaults"]["unit"].as_str().is_some_and(|unit| !unit.is_empty()),
            "{title}: no unit"
        );
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let place = &panel["gridPos"];
        let number = |name: &str| place[name].as_i64().unwrap_or_else(|| panic!("{title}: no {name}"));
        assert!(number("w") > 0 && number("h") > 0 && number("x") >= 0 && number("y") >= 0, "{title}");
        assert!(number("x") + number("w") <= 24, "{title}: wider than the dashboard");
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty(), "{title}: no targets");
        for target in targets {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            let expression = target["expr"].as_str().expect("an expression");
            assert!(expression.contains("$instance") && expression.contains("$tree"), "{title}: {expression}");
        }
    }
    no_overlap(&panels);
}

fn no_overlap(panels: &[Value]) {
    let place = |panel: &Value| {
        let number = |name: &str| panel["gridPos"][name].as_i64().expect("a place");
        (number("x")..number("x") + number("w"), number("y")..number("y") + number("h"))
    };
    let meet = |a: &std::ops::Range<i64>, b: &std::ops::Range<i64>| a.start < b.end && b.start < a.end;
    for (n, one) in panels.iter().enumerate() {
        for other in &panels[n + 1..] {
            let ((ax, ay), (bx, by)) = (place(one), place(other));
            assert!(!(meet(&ax, &bx) && meet(&ay, &by)), "{} lies on {}", one["title"], other["title"]);
        }
    }
}

/// Every metric that there is has a place on the dashboard, or in an alert, or is only there to be joined.
#[test]
fn asks_only_for_what_there_is() {
    let documented = documents::documented();
    let rules = fs::read_to_string(document("dashboards/criu-ebpf-rules.yml")).expect("the rules");
    let queries = queries(&[("$instance", "i"), ("$tree", "t")]);
    let texts = queries.iter().map(|(_, query)| query.as_str()).chain([rules.as_str()]);
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for word in texts.flat_map(|text| text.split(|c| !is_part(c))).filter(|word| word.starts_with("criu_ebpf_")) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word);
        let is_there = documented.iter().any(|(name, _)| name == family || name == word);
        assert!(is_there, "{word} is asked for, but there is no such metric");
    }
}
