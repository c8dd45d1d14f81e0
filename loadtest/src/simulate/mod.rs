//! Scenarios in virtual time: the same phases, fleets and figures as [`crate::run`], without a socket, and up to 16 million devices.
//!
//! What decides is production code: each node's `seawall_proto::admission::Admission` with its limit, breaker, slots and tokens, the rules
//! and `seawall_proto::connect`, and the device machine of `firmware_sim`. What surrounds it is modelled: the network, the accept edge
//! (`network`), the database (`database`). docs/SCENARIOS.md says what is not.
//!
//! Start with [`simulate`]; `world` has the loop.

mod checks;
pub mod database;
mod departures;
mod devices;
mod event;
mod gateway;
mod incidents;
mod network;
mod node;
mod presence;
mod progress;
mod queue;
mod recorder;
mod script;
pub mod sessions;
pub mod settings;
#[cfg(test)]
mod tests;
mod world;

use std::time::Duration;

use progress::Bar;
use recorder::PHASES_MAX;
use sessions::{Publisher, Watched};
pub use world::Broken;
use world::World;

use firmware_sim::profile::Profile;

use crate::{
    report::{self, MAIN_RUN, NAIVE_RUN, PhaseReport, Report, Run, Simulation},
    run::of_run,
    scenario::{Action, Executor, FieldError, Scenario, check, problem},
    threshold::Threshold,
};

/// Most versions that a scenario's devices may run, so that a version is one byte.
const VERSIONS_MAX: usize = 255;
/// Figures that exist only for a real process.
const REAL_ONLY: [&str; 6] = [
    "rss_start_bytes",
    "rss_max_bytes",
    "rss_growth",
    ".sent",
    ".acked",
    "_per_hour",
];

/// Reason why a simulation has no report.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The scenario can't be simulated.
    #[error(transparent)]
    Scenario(#[from] FieldError),
    /// An invariant was violated.
    #[error(transparent)]
    Broken(#[from] Broken),
}

/// Simulates a scenario. Thresholds on the naive server, on memory and on messages are not judged.
///
/// # Errors
/// The scenario can't be simulated, or an invariant broke: then the error says where.
pub fn simulate(scenario: &Scenario) -> Result<Report, SimulateError> {
    checked(scenario)?;
    let thresholds = scenario.thresholds()?;
    report::check_names(scenario, &thresholds)?;
    let started_at = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    let (judged, others): (Vec<_>, Vec<_>) = thresholds.into_iter().partition(is_simulated);
    let mut world = World::new(scenario)?;
    let bar = Bar::new(scenario);
    world.run(|world| bar.update(world))?;
    bar.finish();
    let simulation = Simulation {
        nodes: scenario.simulate.nodes,
        virtual_seconds: Duration::from_micros(world.now.as_micros()).as_secs_f64(),
        events: world.events,
        trace: format!("{:016x}", world.trace()),
        attempts_max: world.recorder.attempts_max(),
    };
    let (phases, samples) = world.recorder.finish(scenario.capacity_per_second, world.now);
    let mut run = Run {
        name: MAIN_RUN.to_owned(),
        summary: of_run(scenario, &phases),
        phases,
        samples,
        stopped: None,
    };
    let mut runs = Vec::new();
    if scenario.presence.is_some() {
        let reads_per_second = scenario.simulate.reads_per_second;
        runs.extend(naive_presence(scenario, &run, reads_per_second)?);
        let watched = sessions::watch(scenario, Publisher::Seawall, reads_per_second)?;
        add_presence(&mut run, watched);
    }
    runs.push(run);
    let mut report = Report::new(scenario, &judged, started_at, runs);
    report.not_judged = others.iter().map(ToString::to_string).collect();
    report.not_judged.extend(scenario.not_judged.iter().cloned());
    report.simulation = Some(simulation);
    Ok(report)
}

/// The naive server's run: its presence, and nothing else.
fn naive_presence(scenario: &Scenario, like: &Run, reads_per_second: f64) -> Result<Option<Run>, FieldError> {
    let Some(naive) = &scenario.naive else {
        return Ok(None);
    };
    let publisher = Publisher::Naive {
        heartbeat: Duration::from_secs_f64(naive.heartbeat_seconds),
        deadline: Duration::from_secs_f64(naive.deadline_seconds),
    };
    let phases = like.phases.iter().map(|phase| PhaseReport {
        name: phase.name.clone(),
        action: phase.action.clone(),
        starts_seconds: phase.starts_seconds,
        seconds: phase.seconds,
        ..PhaseReport::default()
    });
    let mut run = Run {
        name: NAIVE_RUN.to_owned(),
        phases: phases.collect(),
        ..Run::default()
    };
    add_presence(&mut run, sessions::watch(scenario, publisher, reads_per_second)?);
    Ok(Some(run))
}

fn add_presence(run: &mut Run, watched: Watched) {
    run.summary.presence = Some(watched.total);
    for (phase, presence) in run.phases.iter_mut().zip(watched.phases) {
        phase.summary.presence = Some(presence);
    }
}

/// What a scenario must be beyond what `run` asks of it.
fn checked(scenario: &Scenario) -> Result<(), FieldError> {
    scenario.check(Executor::Simulate)?;
    settings::admission(scenario)?;
    if scenario.presence.is_some() {
        sessions::checked(scenario)?;
    }
    check(
        scenario.phases.len() <= PHASES_MAX,
        "phase",
        format!("simulate takes at most {PHASES_MAX}"),
    )?;
    check(
        scenario.versions().count() <= VERSIONS_MAX,
        "fleet.firmware",
        format!("simulate takes at most {VERSIONS_MAX} versions"),
    )?;
    let incidents = &scenario.simulate.incidents;
    check(
        incidents.len() <= settings::INCIDENTS_MAX,
        "simulate.incident",
        format!("expected at most {}", settings::INCIDENTS_MAX),
    )?;
    let strangers_from = scenario.simulate.strangers_from.iter();
    let strangers_from = strangers_from.map(|name| ("simulate.strangers_from", name));
    let incidents = incidents
        .iter()
        .map(|incident| ("simulate.incident.phase", &incident.phase));
    for (field, name) in strangers_from.chain(incidents) {
        let is_known = scenario.phases.iter().any(|phase| phase.name == *name);
        check(is_known, field, format!("there is no phase {name:?}"))?;
    }
    for profile in scenario.fleets.iter().flat_map(|fleet| fleet.profile.keys()) {
        let is_shared = profile
            .parse()
            .is_ok_and(|profile: Profile| profile.devices_per_identity() > 1);
        check(
            !is_shared,
            "fleet.profile",
            "simulate has no model of devices that share an id",
        )?;
    }
    for phase in &scenario.phases {
        if let Action::Block {
            range,
            reason,
            evict,
            retry_after,
        } = &phase.action
        {
            script::rule(range, reason, *evict, retry_after.as_deref())
                .map_err(|error| problem(format!("phase.{}.action.block", phase.name), error))?;
        }
    }
    Ok(())
}

fn is_simulated(threshold: &Threshold) -> bool {
    let is_real = |figure: &&str| {
        let is_naive = figure.starts_with("naive.") && !figure.contains(".presence.");
        is_naive || REAL_ONLY.iter().any(|real| figure.ends_with(real))
    };
    !threshold.figures().iter().any(is_real)
}
