//! Runs the phases of a scenario: which devices connect, drop, churn and change version, and when.
//!
//! Arrivals are open loop: their times do not depend on the server, and latency is measured from them.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rand::{Rng, rngs::StdRng};
use seawall_proto::firmware::Range;
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::Fleet,
    generator::{Gauge, Generator},
    harm::Watch,
    metrics::{STATEMENTS, Sampler},
    plan::Plan,
    postgres::Postgres,
    progress::Progress,
    recorder::{Counters, Recorder, Standing, presence::End},
    scenario::{Action, GROUP_ALL, Phase, Scenario, Trouble, Until},
    server::Server,
    slow,
    storage::Storage,
};

/// Time between two checks of whether the phase is over. The progress is updated then.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Rules at a gateway that runs already end by themselves this long after the longest time that the run can take. So
/// nothing of it stays, even if the load test is killed.
const RULE_LEFT_OVER_MAX: Duration = Duration::from_secs(600);
/// How often a rule is previewed at most, before it is taken to match devices of others, and the time in between.
const PREVIEWS_MAX: u32 = 5;
const PREVIEW_EVERY: Duration = Duration::from_secs(1);
/// Maximum number of random draws for a connected device of a group.
const DRAWS_MAX: u32 = 64;

/// A run, and what it needs: devices, server, database and recorder.
pub struct Runner<'a> {
    pub run: &'a str,
    pub scenario: &'a Scenario,
    pub plan: &'a mut Plan,
    pub fleet: &'a Fleet,
    pub recorder: &'a Recorder,
    pub server: &'a mut Server,
    pub sampler: &'a Sampler,
    pub storage: Option<&'a mut Storage>,
    pub progress: &'a Progress,
    pub interrupted: &'a CancellationToken,
    pub gauge: &'a Gauge,
    /// What the generator did in each phase so far.
    pub loads: Vec<Generator>,
    /// Watches a gateway that is not ours, and cancels `stop` where the run harms it.
    pub watch: Option<&'a Watch>,
    pub stop: &'a CancellationToken,
    /// Why the run was stopped before its end.
    pub stopped: Option<String>,
    pub rng: StdRng,
    /// Number of devices that have been told to connect, from the first on.
    pub begun: usize,
    /// Rules that this run made.
    pub rules: Vec<String>,
    /// Devices that are away, and when they return.
    pub away: VecDeque<(Instant, usize)>,
}

/// Work left in a phase.
struct Agenda {
    started: Instant,
    length: Duration,
    /// Devices that connect first, at this rate.
    connect_per_second: f64,
    /// Devices that change version, evenly over the phase, in this order.
    upgrades: Vec<usize>,
    /// How many of this phase's devices have been told to connect, or to change.
    done: usize,
    /// Devices that wait for their upgrade. Churn does not touch them.
    set_aside: HashSet<usize>,
    churn_next: Option<Instant>,
    power_cut_next: Option<Instant>,
    close_next: Option<Instant>,
}

impl Agenda {
    /// The next device to change version, and when.
    fn next_upgrade(&self) -> Option<(usize, Instant)> {
        let index = *self.upgrades.get(self.done)?;
        let part = to_f64(self.done) / to_f64(self.upgrades.len());
        Some((index, self.started + self.length.mul_f64(part)))
    }
}

impl Runner<'_> {
    /// # Errors
    /// A process died, the API refused, or it was interrupted.
    pub async fn run(&mut self) -> Result<()> {
        let scenario = self.scenario;
        for phase in &scenario.phases {
            self.phase(phase)
                .await
                .with_context(|| format!("in phase `{}` of run `{}`", phase.name, self.run))?;
            self.loads.push(self.gauge.end_phase());
            if self.stopped.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Returns the current counters. Uses the last sample if the server does not answer.
    ///
    /// # Errors
    /// The database's log can't be read.
    pub async fn counters(&self) -> Result<Counters> {
        let ops = self.server.ops().clone();
        let metrics = tokio::task::spawn_blocking(move || ops.metrics())
            .await
            .context("the task that asks")?;
        let statements = match metrics {
            Ok(metrics) => metrics.sum(STATEMENTS),
            Err(_) => self.sampler.last().map_or(0.0, |sample| sample.statements),
        };
        let slow_lookups = match &self.storage {
            Some(storage) if !self.scenario.database.slow_firmware.is_empty() => storage.slow_lookups()?,
            _ => Some(0),
        };
        Ok(Counters {
            statements,
            slow_lookups,
        })
    }

    async fn phase(&mut self, phase: &Phase) -> Result<()> {
        let counters = self.counters().await?;
        self.recorder.begin_phase(Instant::now(), counters);
        self.progress
            .note(&format!("{}: {} ({})", self.run, phase.name, describe(&phase.action)));
        let mut agenda = self.begin(phase).await?;
        let mut look_at = agenda.started;
        while self.stopped.is_none() {
            let now = Instant::now();
            let end = agenda.started + agenda.length;
            let is_over = now >= end;
            self.do_what_is_due(phase, &mut agenda, now.min(end));
            if is_over || now >= look_at {
                look_at = now + LOOK_EVERY;
                let standing = self.recorder.tick(now);
                self.progress.update(|| self.status(phase, &agenda, standing, now));
                if is_over || (phase.until == Some(Until::Connected) && self.is_settled(&agenda, standing)) {
                    break;
                }
                self.check_processes(phase)?;
            }
            let wake = self.next_due(&agenda).map_or(look_at, |due| due.min(look_at)).min(end);
            tokio::select! {
                () = tokio::time::sleep_until(wake.into()) => {}
                () = self.interrupted.cancelled() => bail!("interrupted"),
                () = self.stop.cancelled() => {
                    let reason = self.watch.and_then(Watch::reason).unwrap_or("it was harmed");
                    self.stopped = Some(format!("the run harms the gateway: {reason}"));
                }
            }
        }
        if matches!(phase.action, Action::Database(_))
            && let Some(postgres) = self.database()
        {
            postgres.mend().await.context("mending the database")?;
        }
        if matches!(phase.action, Action::Gateway(_)) {
            self.server.mend();
            self.recorder.disturb(false, Instant::now());
        }
        Ok(())
    }

    fn check_processes(&mut self, phase: &Phase) -> Result<()> {
        self.server.check()?;
        match self.database() {
            Some(postgres) if !matches!(phase.action, Action::Database(_)) => postgres.check(),
            _ => Ok(()),
        }
    }

    /// The database's server, where it is ours.
    fn database(&mut self) -> Option<&mut Postgres> {
        self.storage.as_mut()?.process()
    }

    /// What happens at once, and the agenda of what follows.
    async fn begin(&mut self, phase: &Phase) -> Result<Agenda> {
        let mut agenda = Agenda {
            started: Instant::now(),
            length: phase.time_max(),
            connect_per_second: 0.0,
            upgrades: Vec::new(),
            done: 0,
            set_aside: HashSet::new(),
            churn_next: None,
            power_cut_next: None,
            close_next: None,
        };
        match &phase.action {
            Action::Hold => {}
            Action::Connect { per_second } => agenda.connect_per_second = *per_second,
            Action::DropAll => self.drop_group(GROUP_ALL, agenda.started),
            Action::Drop { group } => self.drop_group(group, agenda.started),
            Action::Grow { firmware, to } => {
                agenda.upgrades = self.plan.to_upgrade(firmware, *to, &mut self.rng);
                agenda.set_aside = agenda.upgrades.iter().copied().collect();
                if self.scenario.database.slow_firmware.contains(firmware) {
                    self.mark(&agenda.upgrades).await?;
                    agenda.started = Instant::now();
                }
            }
            Action::Database(trouble) => {
                if let Some(postgres) = self.database() {
                    match trouble {
                        Trouble::Slow { factor } => postgres.slow_down(*factor),
                        Trouble::Frozen => postgres.freeze(),
                        Trouble::Killed => postgres.kill(),
                    }
                }
            }
            Action::Gateway(trouble) => {
                self.recorder.disturb(true, Instant::now());
                self.server.disturb(*trouble);
            }
            Action::Block {
                range,
                reason,
                evict,
                retry_after,
            } => {
                // The naive server has no rules: there the phase is time alone, as it was for those on call in 2020.
                if self.run == crate::report::MAIN_RUN {
                    let mut expires_after = None;
                    if self.server.is_external() {
                        if let Some(harm) = self.hits_others(range).await? {
                            self.stopped = Some(harm);
                            return Ok(agenda);
                        }
                        expires_after = Some(self.scenario.time_max() + RULE_LEFT_OVER_MAX);
                    }
                    let ops = self.server.ops().clone();
                    let (range, reason, evict, retry_after) =
                        (range.clone(), reason.clone(), *evict, retry_after.clone());
                    let id = tokio::task::spawn_blocking(move || {
                        ops.block(&range, &reason, evict, retry_after.as_deref(), expires_after)
                    })
                    .await
                    .context("the task that makes the rule")??;
                    self.rules.push(id);
                }
            }
            Action::Unblock => self.remove_rules().await?,
        }
        let mut first = |rate: f64| (rate > 0.0).then(|| agenda.started + self.pause(rate));
        agenda.churn_next = first(phase.churn_per_second);
        agenda.power_cut_next = first(phase.power_cuts_per_second);
        agenda.close_next = first(phase.closes_per_second);
        Ok(agenda)
    }

    /// Why a rule on this range must not be made, if it would match devices that are not ours.
    async fn hits_others(&self, range: &str) -> Result<Option<String>> {
        let mut harm = None;
        for attempt in 0..PREVIEWS_MAX {
            if attempt > 0 {
                // The gateway counts its sessions by version about once a second.
                tokio::time::sleep(PREVIEW_EVERY).await;
            }
            let (ops, text) = (self.server.ops().clone(), range.to_owned());
            let matched = tokio::task::spawn_blocking(move || ops.preview(&text))
                .await
                .context("the task that previews the rule")??;
            // A range that does not parse was refused by the preview.
            let ours = range.parse::<Range>().map_or(0, |range| {
                let devices = self.plan.devices.iter().enumerate();
                let matching = devices.filter(|(_, device)| range.matches(Some(&device.firmware)));
                matching.filter(|(index, _)| self.recorder.is_connected(*index)).count()
            });
            if usize::try_from(matched).unwrap_or(usize::MAX) <= ours {
                return Ok(None);
            }
            harm = Some(format!(
                "the rule `{range}` would refuse {matched} connected devices, and only {ours} of them are the load test's"
            ));
        }
        Ok(harm)
    }

    /// Removes the rules that this run has made.
    ///
    /// # Errors
    /// The API refused.
    pub async fn remove_rules(&mut self) -> Result<()> {
        for id in std::mem::take(&mut self.rules) {
            let ops = self.server.ops().clone();
            tokio::task::spawn_blocking(move || ops.remove_rule(&id))
                .await
                .context("the task that removes the rule")??;
        }
        Ok(())
    }

    fn do_what_is_due(&mut self, phase: &Phase, agenda: &mut Agenda, now: Instant) {
        while let Some(at) = self.connect_at(agenda).filter(|at| *at <= now) {
            self.recorder.due(self.begun, at, true);
            self.fleet.connect(self.begun);
            self.begun += 1;
            agenda.done += 1;
        }
        if let Action::Grow { firmware, .. } = &phase.action {
            while let Some((index, at)) = agenda.next_upgrade().filter(|(_, at)| *at <= now) {
                self.upgrade(index, firmware, at);
                agenda.set_aside.remove(&index);
                agenda.done += 1;
            }
        }
        while let Some(at) = agenda.churn_next.filter(|at| *at <= now) {
            let group = phase.churn_group.as_deref().unwrap_or(GROUP_ALL);
            if let Some(index) = self.draw_connected(group, &agenda.set_aside) {
                self.recorder.due(index, at, false);
                self.fleet.restart(index);
            }
            agenda.churn_next = Some(at + self.pause(phase.churn_per_second));
        }
        while let Some(at) = agenda.power_cut_next.filter(|at| *at <= now) {
            if let Some(index) = self.draw_connected(GROUP_ALL, &agenda.set_aside) {
                self.recorder.went_away(index, End::PowerCut, Instant::now());
                self.fleet.cut_power(index);
                self.send_away(index, at);
            }
            agenda.power_cut_next = Some(at + self.pause(phase.power_cuts_per_second));
        }
        while let Some(at) = agenda.close_next.filter(|at| *at <= now) {
            if let Some(index) = self.draw_connected(GROUP_ALL, &agenda.set_aside) {
                self.recorder.went_away(index, End::Closed, Instant::now());
                self.fleet.leave(index);
                self.send_away(index, at);
            }
            agenda.close_next = Some(at + self.pause(phase.closes_per_second));
        }
        while let Some((at, index)) = self.away.front().copied().filter(|(at, _)| *at <= now) {
            self.away.pop_front();
            self.recorder.due(index, at, false);
            self.fleet.restart(index);
        }
    }

    /// A device that went away at `at` returns after the scenario's time.
    fn send_away(&mut self, index: usize, at: Instant) {
        if let Some(away) = self.scenario.presence.and_then(|presence| presence.away()) {
            self.away.push_back((at + away, index));
        }
    }

    /// When the next device connects first. The first of a phase is due at its start, even where an earlier phase has begun some.
    fn connect_at(&self, agenda: &Agenda) -> Option<Instant> {
        let is_left = agenda.connect_per_second > 0.0 && self.begun < self.plan.devices.len();
        is_left.then(|| agenda.started + Duration::from_secs_f64(to_f64(agenda.done) / agenda.connect_per_second))
    }

    /// When something happens next by the agenda.
    fn next_due(&self, agenda: &Agenda) -> Option<Instant> {
        let upgrade_at = agenda.next_upgrade().map(|(_, at)| at);
        let return_at = self.away.front().map(|(at, _)| *at);
        let random = [agenda.churn_next, agenda.power_cut_next, agenda.close_next];
        [self.connect_at(agenda), upgrade_at, return_at]
            .into_iter()
            .chain(random)
            .flatten()
            .min()
    }

    fn drop_group(&mut self, group: &str, now: Instant) {
        for index in 0..self.begun {
            if self.recorder.is_connected(index) && self.recorder.is_in(index, group) {
                self.recorder.due(index, now, true);
                self.fleet.drop_connection(index);
            }
        }
    }

    fn upgrade(&mut self, index: usize, firmware: &str, at: Instant) {
        if let Some(device) = self.plan.devices.get_mut(index) {
            firmware.clone_into(&mut device.firmware);
        }
        self.recorder.upgraded(index, firmware);
        if index < self.begun {
            self.recorder.due(index, at, true);
            self.fleet.upgrade(index, firmware);
        }
    }

    async fn mark(&mut self, indices: &[usize]) -> Result<()> {
        let devices: Vec<_> = indices
            .iter()
            .filter_map(|index| Some(self.plan.devices.get(*index)?.id))
            .collect();
        match &self.storage {
            Some(storage) => slow::mark(&storage.options(), &devices).await,
            None => Ok(()),
        }
    }

    fn draw_connected(&mut self, group: &str, set_aside: &HashSet<usize>) -> Option<usize> {
        if self.begun == 0 {
            return None;
        }
        (0..DRAWS_MAX).find_map(|_| {
            let index = self.rng.random_range(0..self.begun);
            let fits =
                !set_aside.contains(&index) && self.recorder.is_connected(index) && self.recorder.is_in(index, group);
            fits.then_some(index)
        })
    }

    /// Time to the next arrival of a Poisson process.
    fn pause(&mut self, per_second: f64) -> Duration {
        let uniform: f64 = self.rng.random();
        Duration::from_secs_f64(-(1.0 - uniform).ln() / per_second)
    }

    fn is_settled(&self, agenda: &Agenda, standing: Standing) -> bool {
        let has_begun_all = agenda.connect_per_second == 0.0 || self.begun == self.plan.devices.len();
        let has_upgraded_all = agenda.upgrades.is_empty() || agenda.done == agenda.upgrades.len();
        has_begun_all && has_upgraded_all && standing.missing == 0
    }

    fn status(&self, phase: &Phase, agenda: &Agenda, standing: Standing, now: Instant) -> String {
        let sample = self.sampler.last();
        let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"));
        format!(
            "{} {:<12} {:5.1}/{:.0} s  connected {}  missing {}  blocked {}  in flight {}/{}  queue {}",
            self.run,
            phase.name,
            now.saturating_duration_since(agenda.started).as_secs_f64(),
            agenda.length.as_secs_f64(),
            standing.connected,
            standing.missing,
            standing.blocked,
            figure(sample.map(|sample| sample.in_flight)),
            figure(sample.and_then(|sample| sample.limit)),
            figure(sample.map(|sample| sample.queue)),
        )
    }
}

/// The action in words.
#[must_use]
pub fn describe(action: &Action) -> String {
    match action {
        Action::Hold => "hold".to_owned(),
        Action::Connect { per_second } => format!("connect {per_second} a second"),
        Action::DropAll => "drop all".to_owned(),
        Action::Drop { group } => format!("drop {group}"),
        Action::Grow { firmware, to } => format!("grow {firmware} to {:.0} %", to * 100.0),
        Action::Database(Trouble::Slow { factor }) => format!("database {factor}x slower"),
        Action::Database(Trouble::Frozen) => "database frozen".to_owned(),
        Action::Database(Trouble::Killed) => "database killed".to_owned(),
        Action::Gateway(Trouble::Slow { factor }) => format!("server {factor}x slower"),
        Action::Gateway(Trouble::Frozen) => "server frozen".to_owned(),
        Action::Gateway(Trouble::Killed) => "server killed".to_owned(),
        Action::Block { range, evict, .. } => format!("block {range}{}", if *evict { " and evict" } else { "" }),
        Action::Unblock => "unblock".to_owned(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most 18,000 devices")]
const fn to_f64(count: usize) -> f64 {
    count as f64
}
