//! What people see while something runs: one live line on a terminal, a plain line now and then elsewhere.

use std::{
    io::{IsTerminal, stdout},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Without a terminal, at most one line in this time.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// Shows progress on standard output.
#[derive(Debug)]
pub struct Progress {
    live: Option<ProgressBar>,
    said: Mutex<Option<Instant>>,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    #[must_use]
    pub fn new() -> Self {
        let live = stdout().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self {
            live,
            said: Mutex::new(None),
        }
    }

    /// How things stand. On a terminal it replaces what stood there; it may have several lines, of which a plain line joins all.
    pub fn update(&self, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.live {
            bar.set_message(text());
            bar.tick();
            return;
        }
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|at| at.elapsed() >= PLAIN_EVERY) {
            *said = Some(Instant::now());
            println!("{}", text().replace('\n', "  |  "));
        }
    }

    /// Something that stays.
    pub fn note(&self, text: &str) {
        match &self.live {
            Some(bar) => bar.println(text),
            None => println!("{text}"),
        }
    }

    /// Takes the live line away.
    pub fn finish(&self) {
        if let Some(bar) = &self.live {
            bar.finish_and_clear();
        }
    }
}
