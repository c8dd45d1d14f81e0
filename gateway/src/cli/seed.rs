//! `seawall devices seed`: creates devices with random ids and secrets, for trials and load tests.

use std::{
    fs::{File, OpenOptions, Permissions},
    io::{self, BufWriter, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use clap::Args;
use rand::RngCore;
use serde_json::json;

use super::{Context, Failure, devices, table};

/// Maximum number of devices: the lines of one import.
const COUNT_MAX: u64 = 1_000_000;
/// A generated secret: 256 random bits.
const SECRET_BYTES: usize = 32;

#[derive(Debug, Args)]
pub struct Seed {
    /// Number of devices
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=COUNT_MAX))]
    count: u64,
    /// CSV file to write, readable by its owner only; a file with content is never overwritten
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tenant of all of them
    #[arg(long)]
    tenant: Option<String>,
    /// Model of all of them
    #[arg(long)]
    model: Option<String>,
    /// Only write the file, and register nothing
    #[arg(long)]
    offline: bool,
}

/// Writes the file, then registers its devices, unless `--offline` is given.
///
/// # Errors
/// The file can't be written, or the devices could not be registered. Then the file remains.
pub fn run(ctx: &Context, args: &Seed) -> Result<(), Failure> {
    write(args).map_err(|error| Failure::failed(format!("{}: {error}", args.out.display())))?;
    if !args.offline {
        register(ctx, &args.out)?;
    }
    let report = json!({"file": args.out.display().to_string(), "count": args.count, "registered": !args.offline});
    ctx.show(&report, |_| {
        let file = table::text(&args.out.display().to_string());
        if args.offline {
            format!("{} devices written to {file}, and not registered\n", args.count)
        } else {
            format!("{} devices registered and written to {file}\n", args.count)
        }
    })
}

fn write(args: &Seed) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&args.out)?;
    let metadata = file.metadata()?;
    // A device such as /dev/stdout has no length.
    if metadata.len() > 0 {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "the file is not empty and may hold secrets: choose another file",
        ));
    }
    // An existing empty file may have another mode.
    if metadata.is_file() {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    let mut lines = csv::Writer::from_writer(BufWriter::new(file));
    let with = |first: &str, second: &str, tenant: Option<&str>, model: Option<&str>| {
        let mut record = csv::StringRecord::from(vec![first, second]);
        tenant.into_iter().chain(model).for_each(|text| record.push_field(text));
        record
    };
    lines.write_record(&with(
        "id",
        "secret",
        args.tenant.as_ref().map(|_| "tenant"),
        args.model.as_ref().map(|_| "model"),
    ))?;
    let mut rng = rand::rng();
    let mut secret = [0; SECRET_BYTES];
    for _ in 0..args.count {
        rng.fill_bytes(&mut secret);
        let id = uuid::Builder::from_random_bytes(rand::Rng::random(&mut rng)).into_uuid();
        let secret = URL_SAFE_NO_PAD.encode(secret);
        lines.write_record(&with(
            &id.to_string(),
            &secret,
            args.tenant.as_deref(),
            args.model.as_deref(),
        ))?;
    }
    lines
        .into_inner()
        .map_err(|error| io::Error::other(error.to_string()))?
        .flush()
}

fn register(ctx: &Context, path: &Path) -> Result<(), Failure> {
    let file = path.display();
    let unregistered = |problem: String| {
        Failure::failed(format!(
            "{problem}. The devices are in {file} and not registered. Register them with: seawall devices import {file}"
        ))
    };
    let mut lines = File::open(path)?;
    match devices::upload(ctx, &mut lines, false).and_then(|answer| devices::accepted(ctx, answer)) {
        Ok(_) => Ok(()),
        Err(failure) => match failure.text() {
            Some(problem) => Err(unregistered(problem)),
            None => Err(failure),
        },
    }
}
