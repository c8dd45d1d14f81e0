//! What befalls nodes and devices in mid-phase, as `[[simulate.incident]]` has it: a node dies, drains, or has its clock put right; devices
//! lose their memory.

use std::time::Duration;

use rand::Rng;
use seawall_proto::{
    close::{Close, Restart},
    drain::Pacing,
    refusal::{Hint, Peers},
};

use super::{
    checks::Violation,
    database::StatementId,
    event::{Content, Event},
    node::{Eviction, STRANGER},
    script::PASS_MIN,
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

    /// Nobody is behind the node's address.
    pub(super) fn has_died(&self, node: u8) -> bool {
        let node = &self.nodes[usize::from(node)];
        node.is_out && node.drain.is_none()
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
        for device in self.sessions_of(node) {
            self.reset(device)?;
        }
        self.calendar.push(self.now + away, Event::Back { node });
        Ok(())
    }

    fn sessions_of(&self, node: u8) -> Vec<usize> {
        (0..self.begun)
            .filter(|device| self.devices.home(*device) == node && self.books.is_connected(*device))
            .collect()
    }

    fn drain(&mut self, node: u8, within: Duration) {
        let left = self.sessions_of(node);
        let at = &mut self.nodes[usize::from(node)];
        let k_ref = at.state(self.now).k_ref;
        let pacing = Pacing::drain(k_ref, left.len(), within, self.now);
        at.homecoming = Some(pacing.homecoming(left.len(), k_ref, self.now));
        (at.is_out, at.drain) = (
            true,
            Some(Eviction {
                pacing,
                left: Vec::new(),
            }),
        );
        self.leave(node);
    }

    /// Closes the sessions that are due, as the gateway does: those that came in meanwhile, too.
    pub(super) fn leave(&mut self, node: u8) {
        let place = usize::from(node);
        let Some(mut drain) = self.nodes[place].drain.take() else {
            return;
        };
        if drain.left.is_empty() {
            let left = self.sessions_of(node).into_iter();
            drain.left = left.filter_map(|device| u32::try_from(device).ok()).collect();
        }
        let due = drain.pacing.take_due(drain.left.len(), self.now);
        for device in drain.left.drain(..due).collect::<Vec<_>>() {
            let index = device as usize;
            if !self.books.is_connected(index) || self.devices.home(index) != node {
                continue;
            }
            let now = self.now;
            let between = self.nodes[place]
                .homecoming
                .as_mut()
                .map_or_else(|| Peers::None.hint_range(), |homecoming| homecoming.next_range(now));
            let back = Hint::draw(between, &mut self.rng).after;
            let (id, wall) = (self.devices.id(index), self.wall_at(node));
            let admission = &mut self.nodes[place].admission;
            let hint = admission.slot_for_close(id, back, self.now, wall, &mut self.rng);
            let close = Close::Restart {
                why: Restart::Draining,
                hint,
            };
            self.send(device, self.devices.attempt(index), Content::Closed(close));
        }
        let mut next = drain.pacing.poll_timeout().max(self.now + PASS_MIN);
        if drain.left.is_empty() {
            // The last closes are on their way: then it is seen whether others have come.
            next = self.now + Duration::from_secs(3);
        }
        self.nodes[place].drain = Some(drain);
        self.calendar.push(next, Event::Leave { node });
    }

    fn forget(&mut self, share: f64) -> Result<(), Violation> {
        for device in 0..self.begun {
            if !self.books.is_connected(device) && self.rng.random_bool(share) {
                self.restart(device)?;
            }
        }
        Ok(())
    }
}
