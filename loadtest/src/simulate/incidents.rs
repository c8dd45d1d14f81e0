//! Incidents within a phase (`[[simulate.incident]]`): a node dies, drains, or has its clock set; devices lose their
//! memory.

use std::time::Duration;

use rand::Rng;

use super::{
    checks::Violation,
    database::StatementId,
    event::{Content, Event},
    node::STRANGER,
    settings::What,
    world::World,
};

impl World<'_> {
    pub(super) fn incident(&mut self, number: u8) -> Result<(), Violation> {
        let Some(incident) = self.scenario.simulate.incidents.get(usize::from(number)) else {
            return Ok(());
        };
        let node = incident.node;
        match incident.what {
            What::Crash { seconds } => self.crash(node, Duration::from_secs_f64(seconds))?,
            What::Drain { seconds } => self.drain(node, Duration::from_secs_f64(seconds)),
            What::ClockStep { seconds } => {
                #[expect(clippy::cast_possible_truncation, reason = "a day at most")]
                let step = (seconds * 1_000.0) as i64;
                self.nodes[usize::from(node)].clock_error_ms += step;
            }
            What::Forget { share } => self.forget(share)?,
        }
        Ok(())
    }

    fn crash(&mut self, node: u8, away: Duration) -> Result<(), Violation> {
        let sent: Vec<StatementId> = self
            .statements
            .iter()
            .filter(|(_, of)| **of == node)
            .map(|(id, _)| *id)
            .collect();
        for id in sent {
            self.statements.remove(&id);
            self.database.cancel(id, self.now);
        }
        self.forecast();
        let place = usize::from(node);
        for waiting in self.nodes[place].crash(self.now) {
            if waiting.device != STRANGER {
                self.send(waiting.device, waiting.attempt, Content::Reset);
            }
        }
        let state = self.nodes[place].state(self.now);
        self.gauge(node, &state);
        for device in self.sessions_of(node).collect::<Vec<_>>() {
            self.reset(device)?;
        }
        self.calendar.push(self.now + away, Event::Back { node });
        Ok(())
    }

    fn forget(&mut self, share: f64) -> Result<(), Violation> {
        for device in 0..self.begun {
            if !self.recorder.is_connected(device) && self.rng.random_bool(share) {
                self.restart(device)?;
            }
        }
        Ok(())
    }
}
