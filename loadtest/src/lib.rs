//! Load tests for Seawall: scenarios run against real processes over real sockets, and the parts that the demo shares.
//!
//! A scenario ([`scenario::Scenario`]) is read and checked first; [`run::run`] starts the servers it asks for, drives
//! the fleets through its phases, and returns a [`report::Report`], which [`threshold`] judges.
//!
//! Nothing here depends on the gateway's code: it is started, watched and judged from outside, like any other program.

pub mod guard;
pub mod html;
pub mod metrics;
pub mod naive;
pub mod postgres;
pub mod process;
pub mod recorder;
pub mod report;
pub mod scenario;
pub mod threshold;
pub mod fleet { pub struct Profile; impl std::str::FromStr for Profile { type Err = String; fn from_str(s:&str)->Result<Self,String>{ if s=="rude" {Err("rude".into())} else {Ok(Self)} } } }
