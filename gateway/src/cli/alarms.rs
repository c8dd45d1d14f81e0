//! `seawall alarms`: the active alarms.

use clap::{Args, ValueEnum};

use super::{Context, Failure, table};

/// Maximum number of alarms that are requested.
const ALARMS_MAX: usize = 10_000;

#[derive(Debug, Args)]
pub struct Alarms {
    /// The default, which may be left out
    #[arg(default_value = "list", hide_possible_values = true)]
    verb: AlarmsVerb,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AlarmsVerb {
    /// Print the active alarms
    List,
}

pub fn run(ctx: &Context) -> Result<(), Failure> {
    ctx.show(&ctx.client.list("/api/v1/alarms", &[], ALARMS_MAX)?, |answer| {
        table::items(
            answer,
            &[
                ("SEVERITY", "severity"),
                ("ALARM", "kind"),
                ("SUBJECT", "subject"),
                ("SINCE", "since"),
                ("DETAIL", "detail"),
                ("ACTION", "action"),
            ],
        )
    })
}
