mod judge;
mod report;
mod rivals;
mod share;

pub use judge::{Accuracy, HEADS, Judge, JudgeRecipe, answers, train_judge};
pub use report::{DesignersReport, ReportOptions, ReportRow, Sampling, report};
pub use rivals::{Recognised, Rivals};
pub use share::Share;
