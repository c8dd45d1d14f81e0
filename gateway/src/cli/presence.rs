//! `seawall presence`: how many devices are online, offline and unknown.

use clap::{Args, ValueEnum};

use super::{Context, Failure, table};

const COLUMNS: [(&str, &str); 4] = [
    ("KEY", "key"),
    ("ONLINE", "online"),
    ("OFFLINE", "offline"),
    ("UNKNOWN", "unknown"),
];

#[derive(Debug, Args)]
pub struct Presence {
    /// What the counts are of
    #[arg(long, value_enum, default_value = "tenant")]
    by: By,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum By {
    Tenant,
    Model,
    Firmware,
}

impl By {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Model => "model",
            Self::Firmware => "firmware",
        }
    }
}

pub fn run(ctx: &Context, args: &Presence) -> Result<(), Failure> {
    let query = [("by", args.by.as_str().to_owned())];
    let answer = ctx.client.get("/api/v1/presence", &query)?;
    ctx.show(&answer, |answer| {
        let (as_of, lag) = (table::at(answer, "as_of"), table::at(answer, "observer_lag_ms"));
        let rows = table::items(answer, &COLUMNS);
        format!("{rows}\nas of {as_of}, observer lag {lag} ms\n")
    })
}
