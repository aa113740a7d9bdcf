//! The panels of the screen.

use std::collections::BTreeMap;

use indicatif::HumanBytes;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::symbols::bar;
use ratatui::text::Line;
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table, Wrap};

use super::screen::{Sort, View};
use crate::track::report::{ProcessReport, RefusalReport, Report};

/// Characters of a sparkline in the table of processes.
const SPARKS: usize = 20;
const KEYS: &str = "p pause  s sort  ↑↓ scroll  d pre-dump now  D dump now  q quit";

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View) {
    let rows = [Constraint::Length(5), Constraint::Min(5), Constraint::Length(9), Constraint::Length(1)];
    let [top, middle, bottom, foot] = Layout::vertical(rows).areas(frame.area());
    let halves = [Constraint::Percentage(50), Constraint::Percentage(50)];
    let [left, right] = Layout::horizontal(halves).areas(top);
    let thirds = [Constraint::Percentage(22), Constraint::Percentage(28), Constraint::Percentage(50)];
    let [sockets, calls, refusals] = Layout::horizontal(thirds).areas(bottom);
    summary(frame, left, view);
    history(frame, right, &view.report);
    processes(frame, middle, view);
    list(frame, sockets, " sockets ", &socket_lines(&view.report));
    list(frame, calls, " calls by state touched ", &call_lines(&view.report, &view.before));
    refused(frame, refusals, &view.report);
    frame.render_widget(footer(view), foot);
}

fn block(title: impl Into<Line<'static>>) -> Block<'static> {
    Block::bordered().title(title).border_style(Style::new().fg(Color::DarkGray))
}

fn rate(bytes: u64) -> String {
    format!("{}/s", HumanBytes(bytes))
}

fn summary(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let report = &view.report;
    let name = report.processes.iter().find(|p| p.pid == report.pid).map_or("", |p| p.comm.as_str());
    let paused = if view.is_paused { " PAUSED" } else { "" };
    let title = format!(" tree of {} {} ({} processes){paused} ", report.pid, name, report.processes.len());
    let lines = vec![
        Line::from(format!(
            "memory {}   working set {}   since the last image {}",
            HumanBytes(report.memory_bytes),
            HumanBytes(report.working_set_bytes),
            HumanBytes(report.pending_bytes),
        )),
        Line::from(format!(
            "a dump now would freeze it for {:.1} ms   write faults {}   lost records {}",
            report.predicted_freeze_us as f64 / 1e3,
            report.faults.protected + report.faults.missing,
            report.lost.sum(),
        )),
        programs(report),
    ];
    frame.render_widget(Paragraph::new(lines).block(block(title.bold())), area);
}

fn programs(report: &Report) -> Line<'static> {
    let failed: Vec<&str> = report.ebpf.questions.iter().filter(|q| !q.runs).map(|q| q.name.as_str()).collect();
    if failed.is_empty() {
        return Line::from("eBPF: all programs run").green();
    }
    let why = report.ebpf.questions.iter().find_map(|q| q.why_not.clone()).unwrap_or_default();
    Line::from(format!("eBPF: without {} ({why})", failed.join(", "))).yellow()
}

fn history(frame: &mut Frame<'_>, area: Rect, report: &Report) {
    let title = format!(
        " written {}, look {:.1} ms of {} ms ",
        rate(report.written_bytes_per_second),
        report.look_us as f64 / 1e3,
        report.interval_ms,
    );
    let width = area.width.saturating_sub(2) as usize;
    let from = report.history.len().saturating_sub(width);
    let sparkline = Sparkline::default().data(&report.history[from..]).style(Style::new().fg(Color::Cyan));
    frame.render_widget(sparkline.block(block(title)), area);
}

/// Processes in the wanted order, and how deep each stands in the tree.
fn sorted(view: &View) -> Vec<(&ProcessReport, usize)> {
    let all = &view.report.processes;
    let mut flat: Vec<(&ProcessReport, usize)> = all.iter().map(|process| (process, 0)).collect();
    match view.sort {
        Sort::Rate => flat.sort_by_key(|(process, _)| std::cmp::Reverse(process.written_bytes_per_second)),
        Sort::Memory => flat.sort_by_key(|(process, _)| std::cmp::Reverse(process.memory_bytes)),
        Sort::Pid => return as_tree(all),
    }
    flat
}

fn as_tree(all: &[ProcessReport]) -> Vec<(&ProcessReport, usize)> {
    let known: BTreeMap<i32, &ProcessReport> = all.iter().map(|process| (process.pid, process)).collect();
    let is_root = |process: &&ProcessReport| process.parent == process.pid || !known.contains_key(&process.parent);
    let mut ordered = Vec::with_capacity(all.len());
    let mut open: Vec<(&ProcessReport, usize)> = all.iter().rev().filter(is_root).map(|root| (root, 0)).collect();
    while let Some((process, depth)) = open.pop() {
        ordered.push((process, depth));
        let children = all.iter().rev().filter(|child| child.parent == process.pid && child.pid != process.pid);
        open.extend(children.map(|child| (child, depth + 1)));
    }
    ordered
}

fn processes(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let rows = sorted(view).into_iter().skip(view.first).map(|(process, depth)| {
        let name = format!("{}{}", "  ".repeat(depth.min(10)), process.comm);
        let rate = match &process.untracked {
            Some(why) => why.clone(),
            None => rate(process.written_bytes_per_second),
        };
        let row = Row::new([
            process.pid.to_string(),
            name,
            rate,
            sparks(&process.history),
            HumanBytes(process.working_set_bytes).to_string(),
            HumanBytes(process.pending_bytes).to_string(),
            HumanBytes(process.memory_bytes).to_string(),
            process.threads.to_string(),
        ]);
        if process.untracked.is_some() { row.yellow() } else { row }
    });
    let widths = [
        Constraint::Length(8),
        Constraint::Min(12),
        Constraint::Length(14),
        Constraint::Length(SPARKS as u16),
        Constraint::Length(12),
        Constraint::Length(12),
        Constraint::Length(12),
        Constraint::Length(7),
    ];
    let head = ["PID", "NAME", "WRITTEN", "", "WORKING SET", "PENDING", "MEMORY", "THREADS"];
    let title = format!(" processes, by {} ", view.sort.name());
    let table = Table::new(rows, widths).header(Row::new(head).style(Style::new().add_modifier(Modifier::BOLD)));
    frame.render_widget(table.block(block(title)), area);
}

/// The last values as bars, the largest the highest.
fn sparks(history: &[u64]) -> String {
    const BARS: [&str; 9] = [
        " ",
        bar::ONE_EIGHTH,
        bar::ONE_QUARTER,
        bar::THREE_EIGHTHS,
        bar::HALF,
        bar::FIVE_EIGHTHS,
        bar::THREE_QUARTERS,
        bar::SEVEN_EIGHTHS,
        bar::FULL,
    ];
    let latest = &history[history.len().saturating_sub(SPARKS)..];
    let most = latest.iter().copied().max().unwrap_or_default().max(1);
    // Little is more than nothing.
    latest.iter().map(|&value| BARS[(u128::from(value) * 8).div_ceil(u128::from(most)) as usize]).collect()
}

fn socket_lines(report: &Report) -> Vec<String> {
    let sockets = &report.sockets;
    let mut lines: Vec<String> = sockets.by_state.iter().map(|(state, count)| format!("{count:>6} {state}")).collect();
    lines.push(format!("sent {}", HumanBytes(sockets.sent_bytes)));
    lines.push(format!("received {}", HumanBytes(sockets.received_bytes)));
    lines.push(format!("retransmits {}", sockets.retransmits));
    lines
}

/// Calls a second by kind, the most first.
fn call_lines(report: &Report, before: &Report) -> Vec<String> {
    let seconds = (report.interval_ms as f64 / 1e3).max(0.001);
    let mut calls: Vec<(u64, f64, &str)> = report
        .calls
        .iter()
        .map(|(kind, &count)| {
            let new = count.saturating_sub(before.calls.get(kind).copied().unwrap_or(count));
            (count, new as f64 / seconds, kind.as_str())
        })
        .collect();
    calls.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
    calls.iter().map(|(count, rate, kind)| format!("{rate:>9.0}/s {count:>9} {kind}")).collect()
}

fn list(frame: &mut Frame<'_>, area: Rect, title: &'static str, lines: &[String]) {
    let lines: Vec<Line<'_>> = lines.iter().map(|line| Line::from(line.as_str())).collect();
    frame.render_widget(Paragraph::new(lines).block(block(title)), area);
}

fn refused(frame: &mut Frame<'_>, area: Rect, report: &Report) {
    let (options, refusals): (Vec<_>, Vec<_>) = report.refusals.iter().partition(|refusal| refusal.option.is_some());
    let mut lines: Vec<Line<'_>> = refusals.iter().map(|refusal| Line::from(describe(refusal)).red()).collect();
    lines.extend(options.iter().map(|refusal| Line::from(describe(refusal))));
    if lines.is_empty() {
        lines.push(Line::from("nothing that can be seen from outside").green());
    }
    let title = format!(" would refuse a dump: {}, asks for an option: {} ", refusals.len(), options.len());
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: true }).block(block(title)), area);
}

fn describe(refusal: &RefusalReport) -> String {
    let fd = refusal.fd.map_or_else(String::new, |fd| format!(", fd {fd}"));
    let by = refusal.call.as_ref().map_or_else(String::new, |call| {
        let from = call.stack.get(1).or(call.stack.first()).map_or_else(String::new, |frame| format!(" from {frame}"));
        format!(" [{}{from}]", call.name)
    });
    match &refusal.option {
        Some(option) => format!("pid {}{fd}: {}{by}: {option}", refusal.pid, refusal.what),
        None => format!("pid {}{fd}: {}{by}; {}", refusal.pid, refusal.what, refusal.advice),
    }
}

fn footer(view: &View) -> Line<'_> {
    if view.is_asking {
        return Line::from(view.message.as_str()).bold().yellow();
    }
    if view.message.is_empty() { Line::from(KEYS).dim() } else { Line::from(format!("{}  | {KEYS}", view.message)) }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn process(pid: i32, parent: i32, written: u64, memory: u64) -> ProcessReport {
        let comm = format!("p{pid}");
        let history = vec![0, written];
        let written_bytes_per_second = written;
        ProcessReport {
            pid,
            parent,
            comm,
            written_bytes_per_second,
            memory_bytes: memory,
            history,
            ..Default::default()
        }
    }

    fn view(sort: Sort) -> View {
        let processes =
            vec![process(1, 0, 10, 300), process(5, 1, 30, 100), process(3, 1, 20, 200), process(4, 5, 0, 0)];
        View { report: Report { pid: 1, processes, ..Report::default() }, sort, ..View::default() }
    }

    fn order(sort: Sort) -> Vec<(i32, usize)> {
        sorted(&view(sort)).iter().map(|(process, depth)| (process.pid, *depth)).collect()
    }

    #[test]
    fn processes_come_in_the_wanted_order() {
        assert_eq!(order(Sort::Rate), [(5, 0), (3, 0), (1, 0), (4, 0)]);
        assert_eq!(order(Sort::Memory), [(1, 0), (3, 0), (5, 0), (4, 0)]);
        assert_eq!(order(Sort::Pid), [(1, 0), (5, 1), (4, 2), (3, 1)]);
    }

    #[test]
    fn sparks_are_as_high_as_the_values() {
        assert_eq!(sparks(&[0, 1, 50, 100]), format!(" {}{}{}", bar::ONE_EIGHTH, bar::HALF, bar::FULL));
        assert_eq!(sparks(&[0, 0]), "  ");
        assert_eq!(sparks(&[u64::MAX]), bar::FULL);
    }

    #[test]
    fn it_fits_into_any_terminal() {
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
            terminal.draw(|frame| draw(frame, &view(Sort::Pid))).expect("drawing");
        }
    }
}
