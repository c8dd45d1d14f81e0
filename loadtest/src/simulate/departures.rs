//! Sessions that a drain or a rule ends: finds them and closes them, as the gateway's task does.

use std::time::Duration;

use seawall_proto::{
    close::Close,
    departures::{Departure, DrainOrder, NodeLoad, Output, Scan},
    id::Label,
    refusal::Hint,
    rules::Subject,
    time::Instant,
};

use super::{
    event::{Content, Event},
    world::World,
};

impl World<'_> {
    pub(super) fn drain(&mut self, node: u8, deadline: Duration) {
        let order = DrainOrder {
            rate_per_second: None,
            announce: Duration::ZERO,
            deadline,
        };
        let at = &mut self.nodes[usize::from(node)];
        // A second drain of the node changes nothing.
        let _ = at.departures.handle_drain_started(order, self.now);
        at.is_out = true;
        self.depart(node);
    }

    pub(super) fn rules_changed(&mut self, node: u8) {
        self.nodes[usize::from(node)].departures.handle_rules(self.now);
        self.depart(node);
    }

    /// A device has a session, which a scan may have missed.
    pub(super) fn registered(&mut self, device: u32, node: u8) {
        let departures = &mut self.nodes[usize::from(node)].departures;
        // Without a drain the rules decide alone.
        let departure = departures.handle_registered(self.now).unwrap_or(Departure::Eviction);
        self.close(device, node, departure);
    }

    /// Handles a call of the calendar, unless another one has replaced it.
    pub(super) fn departures_due(&mut self, node: u8) {
        if self.nodes[usize::from(node)].departs_at == self.now {
            self.depart(node);
        }
    }

    fn depart(&mut self, node: u8) {
        let place = usize::from(node);
        loop {
            match self.nodes[place].departures.poll_output(self.now) {
                Output::Drain(_) => {}
                Output::Scan(scan) => self.scan(node, scan),
                Output::Close(device, departure) if self.is_left(node, device as usize) => {
                    self.close(device, node, departure);
                }
                Output::Close(..) => {}
                Output::Wait(at) => {
                    let at = at.unwrap_or(Instant::FAR_FUTURE);
                    if at != Instant::FAR_FUTURE && at != self.nodes[place].departs_at {
                        self.calendar.push(at, Event::Depart { node });
                    }
                    self.nodes[place].departs_at = at;
                    return;
                }
            }
        }
    }

    fn scan(&mut self, node: u8, scan: Scan) {
        let is_wanted = |device: &usize| match scan {
            Scan::Left => self.is_left(node, *device),
            Scan::Evicted => self.is_left(node, *device) && self.evicted_for(*device).is_some(),
            // No session lives that long in a simulation.
            Scan::Aged(_) => false,
        };
        let is_possible = scan != Scan::Evicted || self.rules.is_evicting(self.wall());
        let devices = if is_possible { 0..self.begun } else { 0..0 };
        let found = devices.filter(is_wanted);
        let found = found.filter_map(|device| u32::try_from(device).ok()).collect();
        let load = NodeLoad {
            sessions: self.sessions_of(node).count(),
            capacity_per_second: self.nodes[usize::from(node)].state(self.now).k_ref,
            is_calm: true,
        };
        let departures = &mut self.nodes[usize::from(node)].departures;
        departures.handle_found(scan, found, &load, self.now);
    }

    fn close(&mut self, device: u32, node: u8, departure: Departure) {
        let index = device as usize;
        let close = match departure {
            Departure::Restart { why, back_within } => {
                let back = Hint::draw(back_within, &mut self.rng).after;
                let (id, times) = (self.devices.id(index), (self.now, self.wall_at(node)));
                let connect = &mut self.nodes[usize::from(node)].connect;
                let hint = connect.give_slot(id, None, back, times, &mut self.rng);
                Close::Restart { why, hint }
            }
            Departure::Eviction => match self.evicted_for(index) {
                Some(at_least) => Close::evicted(at_least, &mut self.rng),
                None => return,
            },
        };
        self.devices.set_closing(index);
        self.send(device, self.devices.attempt(index), Content::Closed(close));
    }

    pub(super) fn sessions_of(&self, node: u8) -> impl Iterator<Item = usize> {
        (0..self.begun).filter(move |device| self.devices.home(*device) == node && self.recorder.is_connected(*device))
    }

    /// Whether a node has a session of the device that was not told to close.
    fn is_left(&self, node: u8, device: usize) -> bool {
        self.devices.home(device) == node && self.recorder.is_connected(device) && !self.devices.is_closing(device)
    }

    /// The minimum time for which the rule that evicts this session keeps its device away.
    fn evicted_for(&self, device: usize) -> Option<Duration> {
        let cohort = self.devices.cohort(device);
        let subject = Subject {
            device: Some(self.devices.id(device)),
            firmware: Some(self.devices.version_name(cohort.version)),
            model: cohort.model.as_ref().map(Label::as_str),
            tenant: Some(cohort.tenant.as_str()),
        };
        let rule = self.rules.evicting(&subject, self.wall())?;
        Some(rule.evicted_for(self.wall().saturating_since(rule.created_at)))
    }
}
