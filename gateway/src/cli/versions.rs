//! `seawall versions`
use clap::Subcommand;

use super::Failure;

#[derive(Debug, Subcommand)]
pub enum Versions {}

pub fn run(verb: Versions) -> Result<(), Failure> {
    match verb {}
}
