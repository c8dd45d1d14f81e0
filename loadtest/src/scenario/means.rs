//! What a scenario needs beyond what it is run with: a database or a gateway that runs already can't do everything that ours can.

use super::{Action, FieldError, Scenario, check, problem};
use crate::threshold::Threshold;

/// What a scenario is run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// Servers and database are started.
    Own,
    /// Servers are started, and their database is one on a PostgreSQL that runs already.
    LentDatabase,
    /// A gateway that runs already, with whatever database it has.
    RunningGateway,
}

impl Means {
    /// The option that asks for it.
    const fn option(self) -> &'static str {
        match self {
            Self::Own => "run",
            Self::LentDatabase => "--database",
            Self::RunningGateway => "--target",
        }
    }

    /// Whether a threshold's figures can be had. Where they can't, it is not judged.
    #[must_use]
    pub fn can_judge(self, threshold: &Threshold) -> bool {
        // Counts of a gateway that runs already include devices of others.
        let is_ours = |figure: &&str| {
            let last = last_part(figure);
            let names = [
                "handles_per_hour",
                "threads_per_hour",
                "presence_per_hour",
                "counted_false_offline",
            ];
            last.starts_with("rss_") || names.contains(&last)
        };
        self != Self::RunningGateway || !threshold.figures().iter().any(is_ours)
    }
}

impl Scenario {
    /// # Errors
    /// The first setting that can't be had by these means, by its path.
    pub fn check_means(&self, means: Means, thresholds: &[Threshold]) -> Result<(), FieldError> {
        if means == Means::Own {
            return Ok(());
        }
        let option = means.option();
        let only_private =
            |what: &str| format!("{what} takes a PostgreSQL that loadtest starts itself: leave {option} out");
        for phase in &self.phases {
            check(
                !matches!(phase.action, Action::Database(_)),
                format!("phase.{}.action", phase.name),
                only_private("a database that is slow, frozen or killed"),
            )?;
            check(
                means != Means::RunningGateway || !matches!(phase.action, Action::Gateway(_)),
                format!("phase.{}.action", phase.name),
                format!("a server that is slow or frozen is one that loadtest starts itself: leave {option} out"),
            )?;
        }
        check(
            self.database.cores.is_none(),
            "database.cores",
            only_private("keeping the database to some cores"),
        )?;
        if means == Means::RunningGateway {
            let only_ours = |what: &str| format!("{what} takes a database that loadtest can reach: leave {option} out");
            check(
                self.naive.is_none(),
                "naive",
                only_ours("a second server on the same database"),
            )?;
            return check(
                self.database.slow_firmware.is_empty(),
                "database.slow_firmware",
                only_ours("making look-ups slow"),
            );
        }
        if self.database.slow_firmware.is_empty() {
            return Ok(());
        }
        let counts_slow = |threshold: &&Threshold| {
            let figures = threshold.figures();
            figures.iter().any(|figure| last_part(figure) == "slow_lookups")
        };
        match thresholds.iter().find(counts_slow) {
            Some(threshold) => Err(problem(
                "thresholds",
                only_private(&format!(
                    "`{threshold}`: slow_lookups stand in the database's log, and reading it"
                )),
            )),
            None => Ok(()),
        }
    }
}

/// The figure without the run, phase and group it is of.
fn last_part(figure: &str) -> &str {
    figure.rsplit('.').next().unwrap_or(figure)
}
