"""The inputs that an edit hands to a search that trains coefficients."""

from tva.edit.diagnostics import recipe_numbers
from tva.edit.session import EditSession
from tva.evaluation.result import Evaluation
from tva.search import Candidate
from tva.search.learners import TrainingContext
from tva.vectors.task_vector import TaskVector


def training_context(session: EditSession) -> TrainingContext:
    """Return what training coefficients needs; a recipe that is a sum gets coefficients for each of its vectors."""
    options, recipe = session.options, session.goal.recipe
    editor, evaluator = session.editor, session.evaluator
    state, vectors = session.state_of(Candidate.of(scaling_coef=1.0)), session.recipe_vectors
    try:
        numbers = recipe_numbers(state, vectors)
        parts = {name: vector * numbers[name] for name, vector in vectors.items()}
    except ValueError:
        parts = {recipe.text: state.vector()}

    def evaluate(vector: TaskVector) -> dict[str, Evaluation]:
        needed = [task for task in editor.datamodules if task in evaluator.buffers]
        return evaluator([session.learned_state(vector)], needed, "val")[0]

    for task in options.targets or {}:
        evaluator.base(task, "val")  # which sets its data module up, and makes the model's head for it
    editor.set(None, 0.0)
    log = evaluator.log.path
    return TrainingContext(
        trainer=editor.trainer,
        model=editor.model,
        base=editor.base,
        vectors=parts,
        targets=options.targets or {},
        controls=options.controls or {},
        experts={task: evaluator.vectors[task] for task in options.targets or {} if task in evaluator.vectors},
        buffers=evaluator.buffers,
        evaluate=evaluate,
        inputs={**evaluator.facts, "recipe": recipe.text, "coefficients": recipe.coefs, "data": evaluator.data()},
        kept=None if log is None else log.with_name(log.name + ".learned"),
    )
