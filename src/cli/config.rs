//! `coar config check|show`

use clap::Subcommand;

use crate::config::Config;

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Check the settings that `coar serve` would use, and report all errors at once.
    Check {
        #[command(flatten)]
        config: Box<Config>,
    },
    /// Print the settings that `coar serve` would use, as a TOML file.
    Show {
        #[command(flatten)]
        config: Box<Config>,
    },
}

impl ConfigCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Check { config } => {
                config.validate()?;
                println!("the configuration is valid");
            }
            Self::Show { config } => {
                config.validate()?;
                print!("{}", config.to_toml());
            }
        }
        Ok(())
    }
}
