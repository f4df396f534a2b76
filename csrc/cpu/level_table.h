// Ends a level_*.cpp: lists the kernels of that level. FUSEDOPT_LEVEL is the name of the constant.
#define FUSEDOPT_UPDATE(Rule) &update_chunk<Rule>,
extern const Level FUSEDOPT_LEVEL;
const Level FUSEDOPT_LEVEL = {
    FUSEDOPT_LEVEL_NAME, {FUSEDOPT_RULES(FUSEDOPT_UPDATE)}, &squares_chunk, &scale_chunk};
#undef FUSEDOPT_UPDATE
