//! Scenarios in virtual time: the same phases, fleets and figures as [`crate::run`], without a socket, and up to 16 million devices.
//!
//! What decides is production code: each node's `seawall_proto::admission::Admission` with its limit, breaker, slots and tokens, the rules
//! and `seawall_proto::handshake`, and the device machine of `firmware_sim`. What surrounds it is modelled: the network, the accept edge
//! (`network`), the database (`database`). docs/SCENARIOS.md says what is not.
//!
//! Start with [`simulate`]; `world` has the loop.

mod books;
mod checks;
mod database;
mod devices;
mod event;
#[cfg(test)]
mod figures;
mod gateway;
mod incidents;
mod network;
mod node;
mod progress;
mod queue;
mod roll;
mod script;
pub mod settings;
#[cfg(test)]
mod tests;
mod world;

use books::PHASES_MAX;
use progress::Bar;
pub use world::Broken;
use world::World;

use firmware_sim::profile::Profile;

use crate::{
    report::{self, MAIN_RUN, Report, Run, Simulation},
    run::of_run,
    scenario::{Action, Executor, FieldError, Scenario, check, problem},
    threshold::Threshold,
};

/// Most versions that a scenario's devices may run, so that a version is one byte.
const VERSIONS_MAX: usize = 255;
/// Figures that only a real process has.
const REAL_ONLY: [&str; 5] = ["rss_start_bytes", "rss_max_bytes", "rss_growth", ".sent", ".acked"];

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// It can't be simulated.
    #[error(transparent)]
    Scenario(#[from] FieldError),
    /// Something that must hold did not.
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
        virtual_seconds: std::time::Duration::from_micros(world.now.as_micros()).as_secs_f64(),
        events: world.events,
        trace: format!("{:016x}", world.trace()),
        attempts_max: world.books.attempts_max(),
    };
    let (phases, samples) = world.books.finish(scenario.capacity_per_second, world.now);
    let run = Run {
        name: MAIN_RUN.to_owned(),
        summary: of_run(scenario, &phases),
        phases,
        samples,
    };
    let mut report = Report::new(scenario, &judged, started_at, vec![run]);
    report.not_judged = others.iter().map(ToString::to_string).collect();
    report.simulation = Some(simulation);
    Ok(report)
}

/// What a scenario must be beyond what `run` asks of it.
fn checked(scenario: &Scenario) -> Result<(), FieldError> {
    scenario.check(Executor::Simulate)?;
    settings::admission(scenario)?;
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
    let is_real = |figure: &&str| figure.starts_with("naive.") || REAL_ONLY.iter().any(|real| figure.ends_with(real));
    !threshold.figures().iter().any(is_real)
}
