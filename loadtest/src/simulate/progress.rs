//! What people see while a simulation runs: a bar on standard error, on a terminal only.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::world::World;
use crate::scenario::Scenario;

pub(super) struct Bar {
    bar: ProgressBar,
    started: Instant,
}

impl Bar {
    /// Hidden where standard error is not a terminal: indicatif sees to that.
    pub fn new(scenario: &Scenario) -> Self {
        let bar = ProgressBar::with_draw_target(Some(u64::from(scenario.devices)), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} connected\n{msg}") {
            bar.set_style(style);
        }
        Self {
            bar,
            started: Instant::now(),
        }
    }

    pub fn update(&self, world: &World<'_>) {
        if self.bar.is_hidden() {
            return;
        }
        let standing = world.recorder.standing();
        self.bar.set_position(standing.connected);
        self.bar.set_message(format!(
            "{}  {:.1} s of virtual time  missing {}  blocked {}  in flight {}  queue {}  {:.1} million events in {:.0} s",
            world.phase().name,
            std::time::Duration::from_micros(world.now.as_micros()).as_secs_f64(),
            standing.missing,
            standing.blocked,
            world.load.in_flight,
            world.load.queue,
            world.events as f64 / 1e6,
            self.started.elapsed().as_secs_f64(),
        ));
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
