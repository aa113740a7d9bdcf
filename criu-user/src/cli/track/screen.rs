//! The screen of `track`: takes keys and reports, and has the panels drawn.

use std::io;

use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use futures_util::StreamExt;
use ratatui::DefaultTerminal;
use tokio::sync::watch;

use super::dumper::{Dumper, Wanted};
use super::panels;
use crate::track::report::Report;

/// By what processes are sorted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Sort {
    /// Bytes written a second.
    #[default]
    Rate,
    /// Private memory.
    Memory,
    /// As the tree is.
    Pid,
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Rate => Self::Memory,
            Self::Memory => Self::Pid,
            Self::Pid => Self::Rate,
        }
    }

    /// For the title.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Memory => "memory",
            Self::Pid => "pid",
        }
    }
}

/// What is on the screen.
#[derive(Debug, Default)]
pub(super) struct View {
    /// The latest report, or the one at which it was paused.
    pub report: Report,
    /// The one before it.
    pub before: Report,
    pub sort: Sort,
    /// Whether new reports are not shown.
    pub is_paused: bool,
    /// First process that is shown.
    pub first: usize,
    /// What is to be said.
    pub message: String,
    /// Whether a dump waits for being confirmed.
    pub is_asking: bool,
}

/// What a key asks for beyond the view itself.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Nothing,
    Quit,
    Images(Wanted),
}

impl View {
    fn show(&mut self, report: &Report) {
        if !self.is_paused {
            self.before = std::mem::replace(&mut self.report, report.clone());
            self.first = self.first.min(self.report.processes.len().saturating_sub(1));
        }
    }

    fn press(&mut self, key: KeyEvent) -> Asked {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Asked::Quit;
        }
        if self.is_asking {
            self.is_asking = false;
            if key.code == KeyCode::Char('y') {
                return Asked::Images(Wanted::Dump);
            }
            self.message = "no dump was made".to_owned();
            return Asked::Nothing;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Asked::Quit,
            KeyCode::Char('p' | ' ') => self.is_paused = !self.is_paused,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('d') => return Asked::Images(Wanted::PreDump),
            KeyCode::Char('D') => {
                self.is_asking = true;
                self.message = format!("dump process {} and kill its tree? y/n", self.report.pid);
            }
            KeyCode::Down | KeyCode::Char('j') => {
                self.first = (self.first + 1).min(self.report.processes.len().saturating_sub(1));
            }
            KeyCode::Up | KeyCode::Char('k') => self.first = self.first.saturating_sub(1),
            _ => {}
        }
        Asked::Nothing
    }
}

/// The terminal as it is to be left behind, however this ends.
struct Terminal(DefaultTerminal);

impl Drop for Terminal {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Runs until the user quits, or no more reports come.
pub(super) async fn run(reports: &mut watch::Receiver<Report>, mut dumper: Dumper) -> io::Result<()> {
    let mut terminal = Terminal(ratatui::try_init()?);
    let mut events = EventStream::new();
    let mut view = View::default();
    view.show(&reports.borrow_and_update());
    loop {
        terminal.0.draw(|frame| panels::draw(frame, &view))?;
        tokio::select! {
            changed = reports.changed() => match changed {
                Ok(()) => view.show(&reports.borrow_and_update()),
                Err(_) => return Ok(()),
            },
            said = dumper.finished() => view.message = said,
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) if key.kind != KeyEventKind::Release => match view.press(key) {
                    Asked::Nothing => {}
                    Asked::Quit => return Ok(()),
                    Asked::Images(wanted) => view.message = dumper.start(wanted),
                },
                // It is drawn anew in any case, in its new size.
                Some(Ok(_)) => {}
                Some(Err(err)) => return Err(err),
                None => return Ok(()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(view: &mut View, key: char) -> Asked {
        view.press(KeyEvent::new(KeyCode::Char(key), KeyModifiers::NONE))
    }

    #[test]
    fn only_yes_dumps() {
        let mut view = View::default();
        assert_eq!(press(&mut view, 'D'), Asked::Nothing);
        assert!(view.is_asking);
        assert_eq!(press(&mut view, 'q'), Asked::Nothing, "the answer is no, not the end");
        assert!(!view.is_asking);
        press(&mut view, 'D');
        assert_eq!(press(&mut view, 'y'), Asked::Images(Wanted::Dump));
        assert_eq!(press(&mut view, 'y'), Asked::Nothing, "asked once, dumped once");
    }

    #[test]
    fn paused_it_shows_what_was() {
        let mut view = View::default();
        view.show(&Report { looks: 1, ..Report::default() });
        press(&mut view, 'p');
        view.show(&Report { looks: 2, ..Report::default() });
        assert_eq!(view.report.looks, 1);
        press(&mut view, 'p');
        view.show(&Report { looks: 3, ..Report::default() });
        assert_eq!((view.before.looks, view.report.looks), (1, 3));
    }

    #[test]
    fn sorting_goes_round() {
        let mut view = View::default();
        let names: Vec<_> = (0..4).map(|_| (view.sort.name(), press(&mut view, 's')).0).collect();
        assert_eq!(names, ["rate", "memory", "pid", "rate"]);
    }
}
